"""Bounds on the distance of a call from the reference, for any numbers: rounding errors of its arithmetic.

The grid of cases has one bound for numbers of the order of 1. Here they may be of any size, so that the bound
holds per channel, in units of what the arithmetic handles there. With u the bound of the dtype:

    x̂        u |x̂|: x - mean and rstd are rounded a few times each; and rstd |x| 2^-46, as the mean is a sum
             of up to some thousands of float64 numbers of the size of x, each off by 2^-53 of that
    z        |weight| times that, and u (|weight x̂| + |bias| + |residual|)
    y        1.5 times that, as no activation is steeper, and u; then it is rounded to its dtype, once
    dy'      |dy| (2 error of z + u), as no second derivative is above 2 (kinks are kept out: dy = 0 there)
    sums     the sums of the errors, and u times the sums of the absolute values
    dx       with D, X and errors d, e the largest |dy'| and |x̂| of the channel and their errors, in units of
             weight / std: d (2 + X²) + 2 D X e + u D (2 + X²), of dy' - mean(dy') - x̂ mean(dy' x̂)

Numbers below the smallest normal one of the arithmetic may come out as 0: squares of deviations too, so that
with a variance as small and an eps of 0 x̂ may be anything. Numbers that rounding takes over the largest one
of their dtype come out as inf.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.support.compare import Array, as_array
from tests.support.oracle import Expected, Values
from tests.support.tolerances import TOLERANCES

WIDE = 2.0**-46


class Allowed(NamedTuple):
    """Largest error of each value; shapes broadcast against the values."""

    z: Array
    y: Array
    dx: Array
    dresidual: Array
    dweight: Array
    dbias: Array
    running_mean: Array
    running_var: Array


def allowed_for(
    values: Values, expected: Expected, dz: Array, dtype: torch.dtype, activation: str | None
) -> Allowed:
    """Return what the model above allows.

    Args:
        values: of the call.
        expected: by the reference.
        dz: dy', by the reference.
        dtype: of the arithmetic's input, and of y and dx.
    """
    u = TOLERANCES[dtype].bound
    spread = (1, values.x.shape[1], *[1] * (values.x.ndim - 2))
    axes = (0, *range(2, values.x.ndim))

    def largest(of: Array) -> Array:
        """Return the largest finite size per channel, shaped to broadcast."""
        size = np.broadcast_to(np.abs(of), values.x.shape)
        return np.where(np.isfinite(size), size, 0.0).max(axis=axes, initial=0.0, keepdims=True)

    def total(of: Array) -> Array:
        return np.abs(of).sum(axis=axes)

    weight = np.ones(spread) if values.weight is None else np.abs(values.weight).reshape(spread)
    bias = np.zeros(spread) if values.bias is None else np.abs(values.bias).reshape(spread)
    keep = np.ones((len(values.x), *values.x.shape[2:]), dtype=bool) if values.mask is None else values.mask
    counted = np.where(keep[:, None], values.x, 0.0)
    residual = 0.0 if values.residual is None else np.where(keep[:, None], values.residual, 0.0)
    size = largest(counted)
    off = size * WIDE
    std = np.broadcast_to(expected.std, (len(values.x), *expected.std.shape[1:]))
    rstd = largest(1 / std)
    vanishes = arithmetic_of(dtype).tiny * rstd**2 > u
    xhat, e = largest(expected.xhat), u * largest(expected.xhat) + rstd * off
    e = np.where(vanishes, np.inf, e)
    z = weight * e + u * (weight * xhat + bias + largest(np.asarray(residual)))
    y = z if activation is None else 1.5 * z + u
    dy = largest(np.where(keep[:, None], values.dy, 0.0))
    d = u * largest(dz) if activation is None else dy * (2 * z + u)
    big = largest(dz)
    dxhat = d * (2 + xhat**2) + 2 * big * xhat * e + u * big * (2 + xhat**2)
    count = keep.sum()
    dweight = total(dz * expected.xhat) * u + count * (d * xhat + big * e).reshape(-1)
    mean = off.reshape(-1) + u * size.reshape(-1)
    return Allowed(
        z,
        y,
        weight * dxhat * rstd,
        d,
        dweight,
        total(dz) * u + count * d.reshape(-1),
        mean,
        4 * off.reshape(-1) ** 2 + u * 4 * size.reshape(-1) ** 2 + arithmetic_of(dtype).tiny,
    )


def arithmetic_of(dtype: torch.dtype) -> torch.finfo:
    """Return the limits of the numbers that a dtype is computed in."""
    return torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32)


def assert_within(
    actual: Tensor, expected: Array, allowed: Array, where: NDArray[np.bool_], *, what: str
) -> None:
    """Raise unless all values `where` it says so are within what is allowed and one rounding to their dtype.

    Where the reference is not finite, or rounds to inf, the value must not be finite either.
    """
    narrow = torch.finfo(actual.dtype)
    ours = as_array(actual)
    assert ours.shape == expected.shape, f"{what}: shape {ours.shape}, expected {expected.shape}"
    if not ours.size:
        return
    rounding = max(TOLERANCES[actual.dtype].rounding, narrow.eps / 2)
    lost = narrow.tiny * narrow.eps + 4 * arithmetic_of(actual.dtype).tiny
    with np.errstate(all="ignore"):
        # Where statistics are NaN, only what is masked has an answer: 0, exactly.
        near = np.where(np.isnan(allowed), 0.0, allowed) + np.zeros(expected.shape)
        near += rounding * np.abs(expected) + lost
        above = np.abs(expected) + near
        may_overflow = ~(above < narrow.max)  # NaN too
        must_overflow = ~(np.abs(expected) - near <= narrow.max)
        error = np.abs(ours - expected)
        fine = np.where(np.isfinite(ours), (error <= near) & ~must_overflow, may_overflow)
    fine |= ~where
    if not fine.all():
        worst = tuple(int(i) for i in np.argwhere(~fine)[0])
        raise AssertionError(
            f"{what}: {int((~fine).sum())} of {fine.size} values are wrong; the first at {worst}: "
            f"{ours[worst]!r}, expected {expected[worst]!r} within {near[worst]:.3g}"
        )
