"""Forward pass: batch normalization, the residual and the activation."""

from __future__ import annotations

from typing import NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from .activations import ACTIVATIONS
from .groups import Array, counted_positions, group_of_sample, per_channel, per_sample
from .moments import moments


class Options(TypedDict, total=False):
    """Keyword arguments that both directions take; `forward` says what each is."""

    eps: float
    residual: NDArray[np.floating] | None
    mask: NDArray[np.bool_] | None
    group_size: int | None
    mean: Array | None
    var: Array | None


class Normalized(NamedTuple):
    """Output of the forward pass, and the statistics that it used.

    Attributes:
        y: `[N, C, *S]`, the output; 0 at masked positions.
        mean: `[G, C]`, the mean that was subtracted; G = 1 for given statistics.
        var: `[G, C]`, the biased variance.
        rstd: `[G, C]`, 1 / sqrt(var + eps).
        count: `[G]`, number of values per channel.
    """

    y: Array
    mean: Array
    var: Array
    rstd: Array
    count: Array  # type: ignore[assignment]  # shadows tuple.count, a method that is not used


class Standardized(NamedTuple):
    """Intermediate values that both directions need: the statistics, and x before and after the affine map.

    Attributes:
        keep: `[N, 1, *S]`, which positions count.
        groups: `[N]`, the row of the statistics that belongs to each sample.
        mean, var, rstd: `[G, C]`.
        count: `[G]`.
        xhat: `[N, C, *S]`, (x - mean) * rstd; 0 at masked positions.
        z: `[N, C, *S]`, weight * xhat + bias + residual, the input of the activation.
    """

    keep: NDArray[np.bool_]
    groups: NDArray[np.intp]
    mean: Array
    var: Array
    rstd: Array
    count: Array  # type: ignore[assignment]  # shadows tuple.count, a method that is not used
    xhat: Array
    z: Array


def standardize(
    x: NDArray[np.floating],
    weight: Array | None,
    bias: Array | None,
    *,
    eps: float = 1e-5,
    residual: NDArray[np.floating] | None = None,
    mask: NDArray[np.bool_] | None = None,
    group_size: int | None = None,
    mean: Array | None = None,
    var: Array | None = None,
) -> Standardized:
    """Return xhat = (x - mean) * rstd and z = weight * xhat + bias + residual; arguments as in `forward`."""
    if (mean is None) != (var is None):
        raise ValueError("mean and var are given together or not at all")
    x = np.asarray(x, dtype=np.float64)
    keep = counted_positions(x.shape, mask)
    if mean is None or var is None:
        of_batch = moments(x, mask, group_size)
        count, mean, var = of_batch.count, of_batch.mean, of_batch.var
        groups = group_of_sample(x.shape[0], group_size)
    else:
        count = np.array([float(keep.sum())])
        mean, var = np.asarray(mean, dtype=np.float64)[None], np.asarray(var, dtype=np.float64)[None]
        groups = group_of_sample(x.shape[0], None)
    rstd = 1.0 / np.sqrt(var + eps)

    centred = np.where(keep, x - per_sample(mean, groups, x.ndim), 0.0)
    xhat = centred * per_sample(rstd, groups, x.ndim)
    z = per_channel(weight, x.ndim, default=1.0) * xhat + per_channel(bias, x.ndim, default=0.0)
    if residual is not None:
        z = z + np.where(keep, np.asarray(residual, dtype=np.float64), 0.0)
    return Standardized(keep, groups, mean, var, rstd, count, xhat, z)


def forward(
    x: NDArray[np.floating],
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    **options: Unpack[Options],
) -> Normalized:
    """Return the normalized x, and the statistics that were used.

        mean = Σ x / n        var = Σ (x - mean)² / n        rstd = 1 / sqrt(var + eps)
        xhat = (x - mean) * rstd
        y = activation(weight * xhat + bias + residual)

    The sums run over the n counted values of one channel and one group, over all samples and positions in
    it. var is biased: it is the variance of these very values, so that Σ xhat = 0 and
    Σ xhat² = n var / (var + eps), which is n but for eps.

    Args:
        x: `[N, C, *S]`.
        weight: `[C]`, None = 1.
        bias: `[C]`, None = 0.
        activation: a key of `ACTIVATIONS`; None = the identity.
        eps: added to the variance, in units of x²; 1e-5 by default.
        residual: `[N, C, *S]`, added before the activation; None = 0.
        mask: `[N, *S]`, True = the value counts; y is 0 elsewhere, and what is in x there has no influence.
        group_size: consecutive samples that share statistics, the last group may be smaller; None = all N.
        mean: `[C]`, used instead of the batch's (inference, frozen statistics), for every group.
        var: `[C]`, biased, likewise; given together with mean.

    Returns:
        y and the statistics, one row per group; one row for given statistics.

    Raises:
        ValueError: only one of mean and var is given, or the mask has the wrong shape.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1. Groups: Hoffer et al. 2017, arXiv:1705.08741.
    """
    s = standardize(x, weight, bias, **options)
    y = np.where(s.keep, ACTIVATIONS[activation].value(s.z), 0.0)
    return Normalized(y, s.mean, s.var, s.rstd, s.count)
