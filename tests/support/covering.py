"""Small sets of test cases: every pair of options once or more, in place of every combination."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

Candidate = TypeVar("Candidate", bound=Hashable)


def covering(
    candidates: Iterable[Candidate], features: Callable[[Candidate], frozenset[Any]]
) -> list[Candidate]:
    """Return candidates that have each feature that any candidate has.

    It is the greedy choice: each adds as many new features as possible, and of equals the first is taken.
    """
    left = {candidate: features(candidate) for candidate in candidates}
    uncovered = frozenset().union(*left.values())
    chosen = []
    while uncovered:
        best = max(left, key=lambda candidate: len(left[candidate] & uncovered))
        uncovered -= left.pop(best)
        chosen.append(best)
    return chosen


def covering_array(*options: Sequence[Any], strength: int = 2) -> list[tuple[Any, ...]]:
    """Return combinations of one value of each option that have every combination of `strength` of them."""
    places = itertools.product(*(range(len(values)) for values in options))
    chosen = covering(places, lambda place: frozenset(itertools.combinations(enumerate(place), strength)))
    return [tuple(values[at] for values, at in zip(options, place, strict=True)) for place in sorted(chosen)]
