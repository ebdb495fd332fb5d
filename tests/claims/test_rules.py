"""The rule of a verdict, on made-up numbers whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from batchnorm.claims.rules import Part, Verdict, interval_of, judge, worst

ABOVE = Part("x", "x", "2 or more", (2.0, math.inf), 0.0, 1.0)
BELOW = Part("x", "x", "−2 or less", (-math.inf, -2.0), 0.0, 1.0)
WITHIN = Part("x", "x", "no difference", (-0.5, 0.5), None, 1.0)
RANGE = Part("x", "x", "1.2", (1.1, 1.3), 1.0, 0.1, "ratio")


def around(mean: float, half: float, seeds: int = 5) -> list[float]:
    """Returns values whose 95 % interval is mean ± half."""
    values = np.arange(seeds) - (seeds - 1) / 2
    student = {4: 4.303 if seeds == 3 else 3.182, 5: 2.776}[seeds] if seeds > 3 else 4.303
    values = values / values.std(ddof=1) * half * math.sqrt(seeds) / student
    return list(mean + values)


@pytest.mark.parametrize(
    ("part", "mean", "half", "verdict"),
    [
        (ABOVE, 3.0, 0.9, Verdict.REPRODUCED),
        (ABOVE, 3.0, 1.1, Verdict.IN_SHAPE),  # reaches below the band, not to no effect
        (ABOVE, 1.0, 0.9, Verdict.IN_SHAPE),  # excludes the band, and no effect too
        (ABOVE, 1.0, 0.99, Verdict.IN_SHAPE),
        (ABOVE, 1.0, 1.1, Verdict.UNDECIDED),  # holds no effect and the band
        (ABOVE, 0.5, 0.6, Verdict.NOT_REPRODUCED),
        (ABOVE, -3.0, 0.5, Verdict.NOT_REPRODUCED),
        (ABOVE, 0.0, 2.1, Verdict.UNDECIDED),
        (BELOW, -3.0, 0.9, Verdict.REPRODUCED),
        (BELOW, -1.0, 0.9, Verdict.IN_SHAPE),
        (BELOW, 0.0, 1.0, Verdict.NOT_REPRODUCED),
        (BELOW, 3.0, 0.5, Verdict.NOT_REPRODUCED),
        (WITHIN, 0.0, 0.4, Verdict.REPRODUCED),
        (WITHIN, 0.2, 0.4, Verdict.UNDECIDED),
        (WITHIN, 2.0, 0.4, Verdict.NOT_REPRODUCED),
        (WITHIN, -2.0, 0.4, Verdict.NOT_REPRODUCED),
    ],
)
def test_a_part_is_judged_by_where_its_interval_lies(
    part: Part, mean: float, half: float, verdict: Verdict
) -> None:
    judged = judge(part, around(mean, half))
    assert judged.interval == pytest.approx((mean - half, mean + half), rel=1e-3, abs=1e-3)
    assert judged.mean == pytest.approx(mean)
    assert judged.verdict is verdict


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [
        (1.2, 0.05, Verdict.REPRODUCED),
        (1.4, 0.05, Verdict.IN_SHAPE),  # more than was published
        (1.05, 0.02, Verdict.IN_SHAPE),
        (0.9, 0.05, Verdict.NOT_REPRODUCED),
        (1.05, 0.2, Verdict.UNDECIDED),
    ],
)
def test_ratios_are_judged_by_logarithms(mean: float, half: float, verdict: Verdict) -> None:
    values = [math.exp(value) for value in around(math.log(mean), half)]
    judged = judge(RANGE, values)
    assert judged.mean == pytest.approx(mean)
    assert judged.interval == pytest.approx((mean * math.exp(-half), mean * math.exp(half)), rel=1e-3)
    assert judged.verdict is verdict


@pytest.mark.parametrize("values", [[5.0] * 4, [5.0], [], [5.0, 5.0, 5.0, 5.0, math.nan]])
def test_too_few_seeds_or_a_missing_number_decide_nothing(values: list[float]) -> None:
    assert judge(ABOVE, values).verdict is Verdict.UNDECIDED


def test_a_ratio_of_zero_has_no_interval() -> None:
    assert math.isnan(interval_of([1.0, 0.0], is_ratio=True)[0])
    assert interval_of([1.0, 0.0], is_ratio=False)[0] == 0.5


def test_a_claim_is_as_good_as_its_worst_part() -> None:
    assert worst([Verdict.REPRODUCED, Verdict.NOT_REPRODUCED, Verdict.UNDECIDED]) is Verdict.NOT_REPRODUCED
    assert worst([Verdict.IN_SHAPE, Verdict.REPRODUCED]) is Verdict.IN_SHAPE
    assert worst([Verdict.UNDECIDED, Verdict.IN_SHAPE]) is Verdict.UNDECIDED
    assert worst([Verdict.REPRODUCED]) is Verdict.REPRODUCED


def test_the_smallest_effect_is_found_four_times_in_five() -> None:
    random = np.random.RandomState(0)
    for seeds in (5, 8):
        effect = ABOVE.smallest(seeds)
        found = [judge(ABOVE, list(effect + random.randn(seeds))).interval[0] > 0 for _ in range(2000)]
        assert np.mean(found) == pytest.approx(0.8, abs=0.03)
    assert RANGE.smallest(5) == pytest.approx(math.exp(1.682 * 0.1))
    assert math.isnan(ABOVE.smallest(4))
