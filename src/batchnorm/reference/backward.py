"""Backward pass: gradients through the activation, the residual and batch normalization."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray

from .activations import ACTIVATIONS
from .forward import Options, Standardized, standardize
from .groups import Array, per_channel, per_sample


class Gradients(NamedTuple):
    """Gradients of a loss with respect to the inputs of the forward pass.

    Attributes:
        dx: `[N, C, *S]`; 0 at masked positions.
        dweight: `[C]`, also where weight is None, which stands for 1.
        dbias: `[C]`, also where bias is None, which stands for 0.
        dresidual: `[N, C, *S]`, 0 at masked positions; None where there was no residual.
    """

    dx: Array
    dweight: Array
    dbias: Array
    dresidual: Array | None


def backward(
    x: NDArray[np.floating],
    dy: NDArray[np.floating],
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    **options: Unpack[Options],
) -> Gradients:
    """Return the gradients of L, given dy = ∂L/∂y; arguments as in `forward`.

        dresidual = dy'                                          dy' = dy a'(z), see `through_affine`
        dweight = Σ dy' xhat
        dbias = Σ dy'
        dx_i = rstd (dxhat_i - Σ_j dxhat_j / n - xhat_i Σ_j dxhat_j xhat_j / n)    see `through_statistics`
        dx = rstd dxhat                                          for given statistics: they do not depend on x

    The sums of dweight and dbias run over all counted values of a channel, of all groups; those of dx over
    the n of one group. A masked position is in no sum, and y is 0 there whatever x is: its gradients are 0.

    Args:
        x: `[N, C, *S]`, as given to `forward`; so are all the options.
        dy: `[N, C, *S]`, gradient with respect to y; values at masked positions have no influence.

    Returns:
        dx, dweight, dbias, dresidual.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3, the equations after algorithm 1.
    """
    s = standardize(x, weight, bias, **options)
    dz, dxhat, dweight, dbias = through_affine(s, dy, weight, activation)
    if options.get("mean") is None:
        dxhat = through_statistics(s, dxhat)
    dx = np.where(s.keep, dxhat * per_sample(s.rstd, s.groups, dz.ndim), 0.0)
    return Gradients(dx, dweight, dbias, None if options.get("residual") is None else dz)


def through_affine(
    s: Standardized, dy: NDArray[np.floating], weight: Array | None, activation: str | None
) -> tuple[Array, Array, Array, Array]:
    """Return dy', dxhat, dweight and dbias of y = a(z), z = weight * xhat + bias + residual.

    dy' = dy a'(z)        dxhat = weight dy'        dweight = Σ dy' xhat        dbias = Σ dy'
    """
    dz = np.where(s.keep, np.asarray(dy, dtype=np.float64) * ACTIVATIONS[activation].derivative(s.z), 0.0)
    positions = (0, *range(2, dz.ndim))
    dxhat = per_channel(weight, dz.ndim, default=1.0) * dz
    return dz, dxhat, (dz * s.xhat).sum(axis=positions), dz.sum(axis=positions)


def through_statistics(s: Standardized, dxhat: Array) -> Array:
    """Return dx / rstd for the statistics of the batch, `[N, C, *S]`.

    Within one group of n values, x_i reaches L by xhat_i = (x_i - mean) rstd itself, by mean and by var:

        dx_i = dxhat_i rstd + dmean ∂mean/∂x_i + dvar ∂var/∂x_i

        ∂mean/∂x_i = 1 / n         ∂var/∂x_i = 2 (x_i - mean) / n
        dvar  = Σ_j dxhat_j (x_j - mean) ∂rstd/∂var = -(rstd² / 2) Σ_j dxhat_j xhat_j
        dmean = -rstd Σ_j dxhat_j + dvar ∂var/∂mean

    where ∂rstd/∂var = -rstd³ / 2, and ∂var/∂mean = -2 Σ_j (x_j - mean) / n = 0. Put together, with
    (x_i - mean) = xhat_i / rstd,

        dx_i / rstd = dxhat_i - Σ_j dxhat_j / n - xhat_i Σ_j dxhat_j xhat_j / n

    The second and third term take out the parts of dxhat along 1 and along xhat: a shift of all x or, but
    for eps, a stretch changes nothing.
    """
    along_one = _group_mean(dxhat, s.groups, s.count)
    along_xhat = s.xhat * _group_mean(dxhat * s.xhat, s.groups, s.count)
    return dxhat - along_one - along_xhat


def _group_mean(values: Array, groups: NDArray[np.intp], count: Array) -> Array:
    """Return Σ values / n over the n counted values of each sample's group and channel, `[N, C, 1, ...]`.

    values are 0 at the positions that do not count, and an empty group has the mean 0.
    """
    sums = np.zeros((len(count), values.shape[1]))
    np.add.at(sums, groups, values.sum(axis=tuple(range(2, values.ndim))))
    return per_sample(sums / np.maximum(count, 1.0)[:, None], groups, values.ndim)
