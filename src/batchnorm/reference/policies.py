"""Batch renormalization and test-time adaptation: mean and var mix the batch's with the running ones."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray

from .activations import ACTIVATIONS
from .backward import Gradients, backward, through_affine
from .forward import Options, forward, standardize
from .groups import Array, per_channel, per_sample
from .running import Running


class Corrected(NamedTuple):
    """Output and gradients of a batch under a policy.

    Attributes:
        y: `[N, C, *S]`, the output; 0 at masked positions.
        mean, var: `[C]`, the batch's own, biased.
        count: number of values per channel.
        gradients: of the output, given dy.
    """

    y: Array
    mean: Array
    var: Array
    count: float  # type: ignore[assignment]  # shadows tuple.count, a method that is not used
    gradients: Gradients


def renorm(
    x: NDArray[np.floating],
    dy: NDArray[np.floating],
    weight: Array | None,
    bias: Array | None,
    running: Running,
    *,
    r_max: float,
    d_max: float,
    activation: str | None = None,
    **options: Unpack[Options],
) -> Corrected:
    """Return batch renormalization, one group.

        xhat = (x - mean) / std,    std = sqrt(var + eps)
        r = std / running_std                      within [1 / r_max, r_max]
        d = (mean - running_mean) / running_std    within [-d_max, d_max]
        y = activation(weight * (xhat r + d) + bias + residual)

    r and d are constants to the gradient. With them, weight * (xhat r + d) + bias = (weight r) xhat +
    (weight d + bias): plain batch normalization, with weight' = weight r and bias' = weight d + bias. Its
    gradient is known, and by the chain rule dweight = r dweight' + d dbias', dbias = dbias'.

    Args:
        x, dy, weight, bias: as in `backward`; so are activation, and the options eps, residual and mask.
        running: the statistics before this batch.
        r_max, d_max: bounds, as far as they are open.

    Source: Ioffe 2017, arXiv:1702.03275, algorithm 1.
    """
    eps = options.get("eps", 1e-5)
    plain = forward(x, eps=eps, mask=options.get("mask"))
    mean, std = plain.mean[0], 1.0 / plain.rstd[0]
    running_std = np.sqrt(np.asarray(running.var) + eps)
    r = np.clip(std / running_std, 1.0 / r_max, r_max)
    d = np.clip((mean - np.asarray(running.mean)) / running_std, -d_max, d_max)
    scale = r if weight is None else weight * r
    shift = (0.0 if bias is None else bias) + d * (1.0 if weight is None else weight)
    y = forward(x, scale, shift, activation=activation, **options).y
    dx, dscale, dshift, dresidual = backward(x, dy, scale, shift, activation=activation, **options)
    gradients = Gradients(dx, r * dscale + d * dshift, dshift, dresidual)
    return Corrected(y, mean, plain.var[0], float(plain.count[0]), gradients)


def adapted(
    x: NDArray[np.floating],
    dy: NDArray[np.floating],
    weight: Array | None,
    bias: Array | None,
    running: Running,
    *,
    prior: float,
    eps: float = 1e-5,
    residual: NDArray[np.floating] | None = None,
    activation: str | None = None,
    mask: NDArray[np.bool_] | None = None,
) -> Corrected:
    """Return test-time adaptation: running and batch statistics mixed, by number of samples.

        s = n / (n + prior),    n = samples with a value that counts
        mean = (1 - s) running_mean + s m,    var = (1 - s) running_var + s v,    m and v of the batch

    x_i reaches the loss by xhat_i itself, by m and by v, of which a share s gets through; over k values,

        dx_i = rstd dxhat_i + s (dmean / k + dvar 2 (x_i - m) / k)
        dmean = -rstd Σ dxhat         dvar = -(rstd² / 2) Σ dxhat xhat

    where ∂var/∂mean = 0, as v is taken around m and not around the mixed mean.

    Args:
        x, dy, weight, bias, eps, residual, activation, mask: as in `backward`.
        running: the running statistics.
        prior: their weight, in samples.

    Source: Schneider et al. 2020, arXiv:2006.16971, equation 3.
    """
    own = forward(x, eps=eps, mask=mask)
    k, m, v = float(own.count[0]), own.mean[0], own.var[0]
    n = float(len(x) if mask is None else mask.any(axis=tuple(range(1, mask.ndim))).sum())
    s = n / (n + prior) if n + prior > 0 else 0.0
    mean = (1.0 - s) * np.asarray(running.mean) + s * m
    var = (1.0 - s) * np.asarray(running.var) + s * v
    z = standardize(x, weight, bias, eps=eps, residual=residual, mask=mask, mean=mean, var=var)
    y = np.where(z.keep, ACTIVATIONS[activation].value(z.z), 0.0)

    dz, dxhat, dweight, dbias = through_affine(z, dy, weight, activation)
    positions, rstd = (0, *range(2, dz.ndim)), z.rstd[0]
    dmean = -rstd * dxhat.sum(axis=positions)
    dvar = -0.5 * rstd**2 * (dxhat * z.xhat).sum(axis=positions)
    centred = np.where(z.keep, np.asarray(x, dtype=np.float64) - per_sample(m[None], z.groups, dz.ndim), 0.0)
    of_mean, of_var, of_xhat = (per_channel(values, dz.ndim, default=0.0) for values in (dmean, dvar, rstd))
    dx = np.where(z.keep, of_xhat * dxhat + s * (of_mean + 2.0 * of_var * centred) / max(k, 1.0), 0.0)
    return Corrected(y, m, v, k, Gradients(dx, dweight, dbias, None if residual is None else dz))
