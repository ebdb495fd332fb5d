"""The rule of a verdict: where the interval of a measure lies, to no effect and to the published one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from batchnorm.studies.records import NAN
from batchnorm.studies.verdicts.significance import Comparison

LEAST_SEEDS = 5

# Differences from no effect, in standard deviations over seeds, that a two-sided test by Student's t at 95 %
# finds with a probability of 80 %, for 5 to 10 seeds (noncentral t); beyond, the last one is safe.
_DETECTABLE = {5: 1.682, 6: 1.435, 7: 1.273, 8: 1.156, 9: 1.067, 10: 0.996}

RULE = (
    "Each part of a claim is one number per seed. Its 95 % interval over seeds (Student's t, of logarithms "
    "for ratios) is compared with two things that were fixed before the run: the band of values that count "
    "as the published effect, and the value of no effect. Reproduced: the whole interval is within the band. "
    "Reproduced in shape: it is not, but all of it is on the published side of no effect. Not reproduced "
    "here: no value of the interval is in the band, and it is not on that side. Everything else, and "
    "anything with fewer than 5 seeds, is not decided here. A claim of several parts is as good as its worst "
    "part."
)


class Verdict(Enum):
    """What a run says of a claim; the value is what a reader sees, the best first."""

    REPRODUCED = "reproduced"
    IN_SHAPE = "reproduced in shape"
    UNDECIDED = "not decided here"
    NOT_REPRODUCED = "not reproduced here"


@dataclass(frozen=True)
class Part:
    """One measure of a claim, and what its interval has to be.

    Attributes:
        name: of the number that an experiment finds with each seed.
        measure: what the number is.
        published: the published figure of this part, in words.
        band: from which to which value the measure counts as the published effect; infinite for "at least".
        none: the measure's value where there is no effect; None where the claim is that there is none: then
            the band is around it, and there is no shape to reproduce.
        spread: standard deviation of the measure over seeds that is reckoned with before the run; of the
            logarithm for ratios.
        unit: how it is shown: a ratio is a factor, and its interval is taken of logarithms.
    """

    name: str
    measure: str
    published: str
    band: tuple[float, float]
    none: float | None
    spread: float
    unit: Literal["ratio", "points", "percent", "number"] = "number"

    def smallest(self, seeds: int) -> float:
        """Returns the smallest effect that so many seeds find with a probability of 80 %.

        It is a difference from no effect, or a factor for ratios; NaN for fewer seeds than a verdict needs.
        """
        if seeds < LEAST_SEEDS:
            return NAN
        effect = _DETECTABLE[min(seeds, max(_DETECTABLE))] * self.spread
        return math.exp(effect) if self.unit == "ratio" else effect


@dataclass(frozen=True)
class Judged:
    """A part after the run.

    Attributes:
        part: what was measured.
        values: a number per seed.
        mean: over seeds; the geometric mean of ratios.
        interval: 95 % of the mean.
        verdict: by the rule.
    """

    part: Part
    values: tuple[float, ...]
    mean: float
    interval: tuple[float, float]
    verdict: Verdict


def interval_of(values: Sequence[float], *, is_ratio: bool) -> tuple[float, tuple[float, float]]:
    """Returns the mean and its 95 % interval over seeds by Student's t.

    Args:
        values: one per seed.
        is_ratio: take both of logarithms.

    Returns:
        NaN for all three if a value is not finite, or a ratio is not positive.
    """
    if not values or not all(math.isfinite(value) and (value > 0 or not is_ratio) for value in values):
        return NAN, (NAN, NAN)
    found = Comparison(tuple(map(math.log, values) if is_ratio else values), 0.0)
    ends = found.mean, found.mean - found.half_width, found.mean + found.half_width
    mean, low, high = (math.exp(end) if is_ratio else end for end in ends)
    return mean, (low, high)


def judge(part: Part, values: Sequence[float]) -> Judged:
    """Judges a part by its values, one per seed."""
    mean, (low, high) = interval_of(values, is_ratio=part.unit == "ratio")
    return Judged(part, tuple(values), mean, (low, high), _verdict(part, len(values), low, high))


def _verdict(part: Part, seeds: int, low: float, high: float) -> Verdict:
    first, last = part.band
    if seeds < LEAST_SEEDS or math.isnan(low) or math.isnan(high):
        return Verdict.UNDECIDED
    if first <= low and high <= last:
        return Verdict.REPRODUCED
    if part.none is not None and (low > part.none if first >= part.none else high < part.none):
        return Verdict.IN_SHAPE
    if high < first or low > last:
        return Verdict.NOT_REPRODUCED
    return Verdict.UNDECIDED


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Returns the verdict of a claim, which is that of its worst part."""
    order = list(Verdict)
    return max(verdicts, key=order.index)
