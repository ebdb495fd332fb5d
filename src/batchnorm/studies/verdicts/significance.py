"""The rule by which a claim is graded: paired differences over seeds, their spread, and a minimal effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from batchnorm.studies.records import NAN, Run

from .formatting import SPACE, Show, span
from .results import Runs

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond that, the next one up is used.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

# The smallest differences that a reader would act on.
MINIMAL_ACCURACY = 0.005
MINIMAL_LOG_STEPS = math.log(1.1)
MINIMAL_LOG_GRADIENT = math.log(2.0)
MINIMAL_LOG_DRIFT = math.log(1.2)
# A learning rate "works" where accuracy is this close to the best that either arm reached at any rate.
WORKS_WITHIN = 0.02

RULE = (
    "Two arms are compared seed by seed: same initial weights, same order of the data. A difference counts "
    "as real when the 95 % interval of its mean over seeds (Student's t) excludes zero and the mean is at "
    "least the minimal effect: 0.5 percentage points of accuracy, 10 % of the steps, a factor of 2 in "
    "gradients, 20 % of drift. Everything else is “no clear difference”, which is no proof that there is "
    "none. With one seed the spread is unknown and nothing is graded above “indication”."
)


class Grade(Enum):
    """The verdict on a claim; its value is what a reader sees."""

    SUPPORTED = "supported"
    PARTLY = "partly supported"
    UNCLEAR = "no clear difference"
    AGAINST = "not supported"
    INDICATION = "indication only"
    MEASURED = "measured"


@dataclass(frozen=True)
class Comparison:
    """Differences over seeds, batch normalization less the other arm, positive where it is better."""

    differences: tuple[float, ...]
    minimal: float

    @property
    def n(self) -> int:
        """Pairs of runs compared."""
        return len(self.differences)

    @property
    def mean(self) -> float:
        """Mean difference."""
        return sum(self.differences) / self.n if self.n else NAN

    @property
    def half_width(self) -> float:
        """Half the 95 % interval of the mean; NaN for fewer than two pairs."""
        if self.n < 2:
            return NAN
        var_unbiased = sum((d - self.mean) ** 2 for d in self.differences) / (self.n - 1)
        return _STUDENT[min(self.n - 1, len(_STUDENT)) - 1] * math.sqrt(var_unbiased / self.n)

    @property
    def reversed(self) -> Comparison:
        """The other arm less batch normalization."""
        return Comparison(tuple(-d for d in self.differences), self.minimal)

    @property
    def facing(self) -> Comparison:
        """The better arm less the worse one."""
        return self.reversed if self.mean < 0 else self

    @property
    def grade(self) -> Grade:
        """The rule, applied."""
        if self.n < 2:
            return Grade.INDICATION
        if abs(self.mean) < self.minimal or abs(self.mean) <= self.half_width:
            return Grade.UNCLEAR
        return Grade.SUPPORTED if self.mean > 0 else Grade.AGAINST

    def leans(self, better: str, worse: str, same: str) -> str:
        """Returns the word for the result; with one pair of runs, for the side to which it leans."""
        if self.grade is Grade.UNCLEAR or (self.n < 2 and abs(self.mean) < self.minimal):
            return same
        return better if self.mean > 0 else worse

    @property
    def visible(self) -> float:
        """The smallest mean difference that counts as real at this spread; NaN for fewer than two pairs."""
        return max(self.minimal, self.half_width) if self.n > 1 else NAN

    def basis(self, show: Show) -> str:
        """Returns the interval and the number of seeds, to stand beside a difference.

        Where no difference is clear, it says how large one would have had to be.
        """
        if self.n < 2:
            return "1 seed, spread unknown"
        low, high = (show(self.mean + side * self.half_width) for side in (-1, 1))
        text = f"95{SPACE}% interval {span(low, high, ' to ')}, {self.n} seeds"
        if self.grade is not Grade.UNCLEAR:
            return text
        return f"{text}; {show(self.visible).removeprefix('+')} or more would have shown"


def compare(ours: Runs, theirs: Runs, measure: Callable[[Run], float], *, minimal: float) -> Comparison:
    """Compares two arms over the seeds that both have, where both gave a number: ours less theirs."""
    pairs = [(measure(ours[seed]), measure(theirs[seed])) for seed in sorted(ours.keys() & theirs.keys())]
    differences = tuple(a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b))
    return Comparison(differences, minimal)


def compare_in_blocks(
    blocks: Sequence[tuple[Runs, Runs]], measure: Callable[[Run], float], *, minimal: float
) -> Comparison:
    """Compares two arms within blocks, such as learning rates: of each seed, the mean difference over blocks.

    What differs between blocks falls out of the differences, and a seed counts once, however many blocks
    there are. Seeds that are not in every block are left out.
    """
    found: dict[int, list[float]] = {}
    for ours, theirs in blocks:
        for seed in ours.keys() & theirs.keys():
            difference = measure(ours[seed]) - measure(theirs[seed])
            if math.isfinite(difference):
                found.setdefault(seed, []).append(difference)
    whole = [of for _, of in sorted(found.items()) if len(of) == len(blocks)]
    return Comparison(tuple(sum(of) / len(of) for of in whole), minimal)


@dataclass(frozen=True)
class Claim:
    """One claim about one network, with what its runs say of it.

    Attributes:
        key: names the pictures that belong to the claim.
        figure: the one number of the overview.
        phrase: continues "batch normalization ..." in the summary.
    """

    key: str
    label: str
    question: str
    grade: Grade
    figure: str
    phrase: str
    answer: str
    details: tuple[str, ...] = ()
