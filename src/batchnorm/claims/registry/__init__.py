"""The claims that are tested, with their published figures and the rules of their verdicts."""

from __future__ import annotations

from . import depth, regularization, statistics, training

CLAIMS = tuple(
    sorted(
        (*training.CLAIMS, *depth.CLAIMS, *statistics.CLAIMS, *regularization.CLAIMS),
        key=lambda claim: claim.number,
    )
)

__all__ = ["CLAIMS"]
