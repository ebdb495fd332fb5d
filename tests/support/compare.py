"""The one comparison of a result with the reference, and the reference's results for a case."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from batchnorm import reference

from .cases import Case, Inputs
from .tolerances import TOLERANCES

Array = NDArray[np.float64]


class Results(NamedTuple):
    """The reference's results of a case; float64.

    Attributes:
        y: `[N, C, *S]`.
        mean, var, rstd: `[G, C]`, with biased var.
        count: `[G]`.
        dx: `[N, C, *S]`.
        dweight, dbias: `[C]`.
        dresidual: `[N, C, *S]`; None where the case has no residual.
        std: `[N, C, 1, ...]`, 1 / rstd of each sample's group: the `scale` that puts dx in units of 1/std.
    """

    y: Array
    mean: Array
    var: Array
    rstd: Array
    count: Array
    dx: Array
    dweight: Array
    dbias: Array
    dresidual: Array | None
    std: Array


def reference_results(
    case: Case,
    inputs: Inputs,
    *,
    eps: float = 1e-5,
    mean: Tensor | None = None,
    var: Tensor | None = None,
) -> Results:
    """Return the reference's forward and backward pass on the case's inputs.

    Args:
        case: where the group size and the activation come from.
        inputs: what `case.make` returned, on any device.
        eps: added to the variance.
        mean: `[C]`, used instead of the batch's mean.
        var: `[C]`, biased, used instead of the batch's variance; given together with mean.
    """
    x, weight, bias, residual, dy, mask = (None if t is None else as_array(t) for t in inputs)
    options = {
        "eps": eps,
        "residual": residual,
        "mask": None if mask is None else mask.astype(np.bool_),
        "mean": None if mean is None else as_array(mean),
        "var": None if var is None else as_array(var),
        **case.options,
    }
    forward = reference.forward(x, weight, bias, **options)
    backward = reference.backward(x, dy, weight, bias, **options)
    samples = np.arange(case.shape[0])
    group = samples * 0 if mean is not None or case.group_size is None else samples // case.group_size
    std = 1.0 / forward.rstd[group]
    return Results(*forward, *backward, std.reshape(*std.shape, *[1] * (len(case.shape) - 2)))


@functools.cache
def case_results(case: Case, *, seed: int = 0, eps: float = 1e-5) -> Results:
    """Return `reference_results` of `case.make(seed)`: computed once in a process, and read-only."""
    results = reference_results(case, case.make(seed), eps=eps)
    for values in results:
        if values is not None:
            values.flags.writeable = False
    return results


def as_array(values: Tensor | ArrayLike) -> Array:
    """Return the values as a float64 array; exact for every narrower dtype."""
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def assert_close(
    actual: Tensor | ArrayLike,
    expected: Tensor | ArrayLike,
    *,
    dtype: torch.dtype,
    scale: ArrayLike = 1.0,
    what: str,
) -> None:
    """Raise unless every value is within the tolerance of `dtype` (see `tolerances`).

    Args:
        actual: what our code returned.
        expected: what the reference says, of the same shape and finite.
        dtype: the dtype that `actual` is stored in: the row of the table.
        scale: multiplies both before they are compared; broadcasts against them. For dx it is
            `Results.std`.
        what: name of the value, for the message.

    Raises:
        AssertionError: with the name, the worst index, both values there, the error and what is allowed.
    """
    ours, theirs = as_array(actual), as_array(expected)
    if ours.shape != theirs.shape:
        raise AssertionError(f"{what}: shape {ours.shape}, expected {theirs.shape}")
    if not np.isfinite(theirs).all():
        raise AssertionError(f"{what}: the expected values are not finite, nothing can be compared with them")
    if ours.size == 0:
        return
    ours, theirs = ours * np.asarray(scale), theirs * np.asarray(scale)
    tolerance = TOLERANCES[dtype]
    allowed = tolerance.rounding * np.abs(theirs) + tolerance.bound * (1.0 + np.abs(theirs).max())
    error = np.where(np.isfinite(ours), np.abs(ours - theirs), np.inf)
    if (error <= allowed).all():
        return
    worst = np.unravel_index((error / allowed).argmax(), error.shape)
    index = tuple(int(i) for i in worst)
    raise AssertionError(
        f"{what} ({dtype}): {int((error > allowed).sum())} of {error.size} values are too far off. Worst at "
        f"{index}: {ours[worst]!r}, expected {theirs[worst]!r}, error {error[worst]:.3g}, "
        f"allowed {allowed[worst]:.3g}"
    )
