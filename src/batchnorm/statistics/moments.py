"""Merges the moments of several parts of a set of values."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, Self, TypeVar

if TYPE_CHECKING:  # Python has defaults of type variables from 3.13 on
    from typing_extensions import TypeVar as TypeVarWithDefault

    T = TypeVarWithDefault("T", default=Any)
else:
    T = TypeVar("T")


class Array(Protocol):
    """A wide array of any framework, one number per channel, or a number that broadcasts against it."""

    def __add__(self, other: Self | float, /) -> Self: ...
    def __radd__(self, other: Self | float, /) -> Self: ...
    def __sub__(self, other: Self | float, /) -> Self: ...
    def __rsub__(self, other: Self | float, /) -> Self: ...
    def __mul__(self, other: Self | float, /) -> Self: ...
    def __rmul__(self, other: Self | float, /) -> Self: ...
    def __truediv__(self, other: Self | float, /) -> Self: ...
    def __rtruediv__(self, other: Self | float, /) -> Self: ...
    def __neg__(self) -> Self: ...


A = TypeVar("A", bound=Array)


class PooledMoments(NamedTuple, Generic[T]):
    """Count, mean and centred second moment, each an array of type T.

    Without a type they are Any, as the code of each framework also uses the methods of its own arrays.

    Attributes:
        count: number of values, a scalar or an array that broadcasts against `mean`.
        mean: `[..., C]`.
        m2: `[..., C]`, sum of (x - mean)².
    """

    count: T  # type: ignore[assignment]  # the name of a method of tuples
    mean: T
    m2: T


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


def pooled(parts: PooledMoments, xp: ModuleType) -> PooledMoments:
    """Return the moments of the union of all parts along the first axis, any of which may be empty.

    As `merge`, for all parts at once, around the mean of the first:

        mean = Σ n_k mean_k / n,    m2 = Σ m2_k + Σ n_k (mean_k - mean)²

    Args:
        parts: count `[K, 1]` (or `[K, 1, ...]`), mean and m2 `[K, ..., C]`.
        xp: the module with the arrays' `sum`: numpy, torch or keras.ops.
    """
    count = xp.sum(parts.count, axis=0)
    center = parts.mean[0]
    apart = parts.mean - center
    shift = xp.sum(parts.count / (count + (count == 0)) * apart, axis=0)
    between = xp.sum(parts.count * (apart - shift) * (apart - shift), axis=0)
    return PooledMoments(count, center + shift, xp.sum(parts.m2, axis=0) + between)
