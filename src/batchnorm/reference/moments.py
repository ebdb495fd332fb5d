"""Count, mean and centred second moment of each channel, and their merge."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .groups import Array, counted_positions, group_count, group_of_sample


class Moments(NamedTuple):
    """Count, mean and centred second moment of the values of each group and channel.

    Attributes:
        count: `[G]`, number of values per channel.
        mean: `[G, C]`, Σ x / count; 0 where nothing was counted.
        m2: `[G, C]`, Σ (x - mean)²; 0 where nothing was counted.
    """

    count: Array  # type: ignore[assignment]  # shadows tuple.count, a method that is not used
    mean: Array
    m2: Array

    @property
    def var(self) -> Array:
        """`[G, C]`, the biased variance m2 / count; 0 where nothing was counted."""
        return self.m2 / np.maximum(self.count, 1.0)[:, None]

    @property
    def var_unbiased(self) -> Array:
        """`[G, C]`, m2 / (count - 1), whose expectation is the variance; 0 for fewer than two values."""
        return self.m2 / np.maximum(self.count - 1.0, 1.0)[:, None]


def moments(
    x: NDArray[np.floating],
    mask: NDArray[np.bool_] | None = None,
    group_size: int | None = None,
) -> Moments:
    """Return the moments of the counted values of each group and channel.

    Two passes: the mean of all n values first, then the deviations d_i = x_i - mean from what was computed.
    The computed mean is off by a rounding error e, mean = µ + e with µ the exact one, so d_i = (x_i - µ) - e
    and Σ d_i = -n e. From this both can be corrected:

        µ = mean + Σ d_i / n
        Σ (x_i - µ)² = Σ (d_i + e)² = Σ d_i² + 2 e Σ d_i + n e² = Σ d_i² - (Σ d_i)² / n

    Never E[x²] - E[x]², which loses everything where |mean| is far above the spread.

    Args:
        x: `[N, C, *S]`.
        mask: `[N, *S]`, True = the value counts; None = all. What is in x elsewhere has no influence.
        group_size: number of consecutive samples per group, the last may have fewer; None = one group.

    Returns:
        Moments of G = ceil(N / group_size) groups, one for no group size.

    Source: Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance", The American
    Statistician 37(3), the corrected two-pass algorithm.
    """
    x = np.asarray(x, dtype=np.float64)
    channels = x.shape[1]
    keep = counted_positions(x.shape, mask)
    groups = group_of_sample(x.shape[0], group_size)
    size = group_count(x.shape[0], group_size)
    count, mean, m2 = np.zeros(size), np.zeros((size, channels)), np.zeros((size, channels))
    for group in range(size):
        here = groups == group
        values = np.moveaxis(x[here], 1, -1)[keep[here][:, 0]]  # [n, C]
        n = len(values)
        if n == 0:
            continue
        rough = values.mean(axis=0)
        deviation = values - rough
        residue = deviation.sum(axis=0)
        count[group] = n
        mean[group] = rough + residue / n
        m2[group] = (deviation**2).sum(axis=0) - residue**2 / n
    return Moments(count, mean, m2)


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of two disjoint sets of values taken together, group by group.

    With n = n_a + n_b and delta = mean_b - mean_a the mean of all is

        mean = (n_a mean_a + n_b mean_b) / n = mean_a + delta n_b / n

    so mean_a - mean = -delta n_b / n and mean_b - mean = delta n_a / n. The deviations of a set from its own
    mean sum to zero, hence Σ_a (x - mean)² = m2_a + n_a (mean_a - mean)², the same for b, and their sum is

        m2 = m2_a + m2_b + delta² (n_a n_b² + n_b n_a²) / n² = m2_a + m2_b + delta² n_a n_b / n

    A set without values changes nothing: its mean has the weight 0.

    Args:
        a: moments of G groups and C channels.
        b: moments of as many groups and channels.

    Source: Chan, Golub & LeVeque 1983, The American Statistician 37(3), equation 2.1.
    """
    count = a.count + b.count
    share = b.count / np.maximum(count, 1.0)  # n_b / n, and 0 where both are empty
    delta = b.mean - a.mean
    mean = a.mean + delta * share[:, None]
    m2 = a.m2 + b.m2 + delta**2 * (a.count * share)[:, None]
    return Moments(count, mean, m2)
