"""Masks and groups of samples: which values a statistic is of, and its broadcast back to positions."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def counted_positions(x_shape: tuple[int, ...], mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Return which positions of x `[N, C, *S]` count, `[N, 1, *S]`: those of the mask `[N, *S]`, or all.

    Raises:
        ValueError: the mask has another shape than x without its channels.
    """
    shape = (x_shape[0], *x_shape[2:])
    if mask is None:
        return np.ones(shape, dtype=np.bool_)[:, None]
    if mask.shape != shape or mask.dtype != np.bool_:
        raise ValueError(f"mask must be bool {shape} for x {x_shape}, got {mask.dtype} {mask.shape}")
    return mask[:, None]


def group_of_sample(samples: int, group_size: int | None) -> NDArray[np.intp]:
    """Return the group of each sample, `[N]`: sample n is in group n // group_size, or in the one group 0."""
    if group_size is None:
        return np.zeros(samples, dtype=np.intp)
    return np.arange(samples, dtype=np.intp) // group_size


def group_count(samples: int, group_size: int | None) -> int:
    """Return G = ceil(N / group_size), at least 1, the last group being smaller; 1 for no group size."""
    return 1 if group_size is None else max(1, math.ceil(samples / group_size))


def per_channel(values: Array | None, ndim: int, *, default: float) -> Array:
    """Return values `[C]` shaped to go with x of `ndim` axes, `[1, C, 1, ...]`; the default where None."""
    filled = np.array([default]) if values is None else np.asarray(values, dtype=np.float64)
    return filled.reshape(1, -1, *[1] * (ndim - 2))


def per_sample(values: Array, groups: NDArray[np.intp], ndim: int) -> Array:
    """Return values `[G, C]` for each sample of its group, `[N, C, 1, ...]`."""
    chosen = values[groups]
    return chosen.reshape(*chosen.shape, *[1] * (ndim - 2))
