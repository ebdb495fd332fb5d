"""Moments of a union from the moments of its parts."""

from __future__ import annotations

from typing import Any, NamedTuple


class PooledMoments(NamedTuple):
    """Count, mean and centred second moment, in any array type with Python's operators.

    Attributes:
        count: number of values, a scalar or an array that broadcasts against `mean`.
        mean: `[..., C]`.
        m2: `[..., C]`, sum of (x - mean)².
    """

    count: Any
    mean: Any
    m2: Any


def merge(a: PooledMoments, b: PooledMoments) -> PooledMoments:
    """Return the moments of the union of two sets of values, either of which may be empty.

    With n = n_a + n_b and δ = mean_b - mean_a:

        mean = mean_a + δ n_b / n
        m2   = m2_a + m2_b + δ² n_a n_b / n

    Source: Chan, Golub & LeVeque, "Algorithms for computing the sample variance", The American Statistician
    37 (1983), equation 2.1.
    """
    count = a.count + b.count
    share = b.count / (count + (count == 0))
    delta = b.mean - a.mean
    return PooledMoments(count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.count * share))


def pooled(parts: PooledMoments, xp: Any) -> PooledMoments:
    """Return the moments of the union of all parts along the first axis, any of which may be empty.

    As `merge`, of all at once, around the first one's mean:

        mean = Σ n_k mean_k / n,    m2 = Σ m2_k + Σ n_k (mean_k - mean)²

    Args:
        parts: count `[K, 1]` (or `[K, 1, ...]`), mean and m2 `[K, ..., C]`.
        xp: where `sum` is: numpy, torch and keras.ops are such.
    """
    count = xp.sum(parts.count, axis=0)
    center = parts.mean[0]
    apart = parts.mean - center
    shift = xp.sum(parts.count / (count + (count == 0)) * apart, axis=0)
    between = xp.sum(parts.count * (apart - shift) * (apart - shift), axis=0)
    return PooledMoments(count, center + shift, xp.sum(parts.m2, axis=0) + between)
