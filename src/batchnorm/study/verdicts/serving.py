"""Claims about use: which statistics serve at test time, and what a training step costs."""

from __future__ import annotations

import math

from batchnorm.study.verdicts import formatting as q
from batchnorm.study.verdicts.arms import BASELINE, SUBJECT, has_pair
from batchnorm.study.verdicts.results import KINDS_OF_TEST_STATISTICS, NAN, Network, Sample
from batchnorm.study.verdicts.significance import MINIMAL_ACCURACY, Claim, Comparison, Grade
from batchnorm.study.verdicts.training import reached

# A block of steps that takes this many times the median says that the machine had other work.
DISTURBED = 3.0


def statistics_at_test_time(network: Network) -> Claim | None:
    """Held-out accuracy under batch, running and calibrated statistics."""
    runs = [run for run in network.at_best(SUBJECT).values() if not run.diverged]
    rows = [[run.test_time.get(kind, NAN) for kind in KINDS_OF_TEST_STATISTICS] for run in runs]
    triples = [row for row in rows if all(map(math.isfinite, row))]
    if not triples:
        return None
    batch, running, calibrated = (tuple(column) for column in zip(*triples, strict=True))
    of_calibrating = Comparison(
        tuple(c - r for c, r in zip(calibrated, running, strict=True)), MINIMAL_ACCURACY
    )
    of_batch = Comparison(tuple(b - r for b, r in zip(batch, running, strict=True)), MINIMAL_ACCURACY)
    shown = [q.spread(Sample(values), q.percent) for values in (running, calibrated, batch)]
    answer = (
        f"Held-out accuracy of the same trained networks is {shown[0]} with the running statistics, "
        f"{shown[1]} with statistics calibrated over the training data, {shown[2]} with those of each test "
        f"batch. Calibrating brings {q.points(of_calibrating.mean)} ({of_calibrating.basis(q.points)}): "
        + of_calibrating.leans("better", "worse", "no clear difference, the running statistics serve as well")
        + "."
    )
    detail = (
        f"Statistics of each test batch in place of the running ones: {q.points(of_batch.mean)} "
        f"({of_batch.basis(q.points)}). They make a prediction depend on its neighbours in the batch."
    )
    return Claim(
        key="statistics",
        label="Gains by calibration",
        question="At test time: do calibrated statistics beat the running ones?",
        grade=of_calibrating.grade,
        figure=q.points(of_calibrating.mean),
        phrase=of_calibrating.leans(
            "gains by calibration",
            "loses by calibration",
            "serves as well with running statistics as with calibrated ones",
        ),
        answer=answer,
        details=(detail,),
    )


def cost(network: Network) -> Claim | None:
    """Seconds and bytes of a training step, with and without batch normalization."""
    if not has_pair(network):
        return None
    time, kept = (
        [network.summary.get(arm, {}).get(metric, Sample(())) for arm in (SUBJECT, BASELINE)]
        for metric in ("seconds_per_step", "bytes_kept_for_backward")
    )
    sentences, factors = [], []
    if time[0].median > 0 and time[1].median > 0:
        factor = q.times(time_ratio(*time))
        sentences.append(
            f"A training step takes {q.duration(time[0].median)} with batch normalization and "
            f"{q.duration(time[1].median)} without (medians): {factor} times as long."
        )
        factors.append(f"{factor}× the time")
    if kept[0].mean > 0 and kept[1].mean > 0:
        factor = q.times(kept[0].mean / kept[1].mean)
        sentences.append(
            f"It keeps {q.megabytes(kept[0].mean)} for the backward pass, against "
            f"{q.megabytes(kept[1].mean)}: {factor} times as much."
        )
        factors.append(f"{factor}× the memory")
    if not sentences:
        return None
    if not any(sample.finite for sample in kept):
        sentences.append("What it keeps for the backward pass was not measured.")
    return Claim(
        key="cost",
        label="Cost of a step",
        question="What does it cost per step?",
        grade=Grade.MEASURED,
        figure=", ".join(factors),
        phrase=f"costs {q.listed(factors)} per step",
        answer=" ".join(sentences),
        details=(*_time_to_target(network, time), *_disturbance(time)),
    )


def time_ratio(ours: Sample, theirs: Sample) -> float:
    """How many times as long: the median over pairs timed in turn, else the ratio of medians."""
    if len(ours.values) != len(theirs.values):
        return ours.median / theirs.median
    pairs = zip(ours.values, theirs.values, strict=True)
    return Sample(tuple(a / b for a, b in pairs if b > 0)).median


def _time_to_target(network: Network, time: list[Sample]) -> list[str]:
    arms = [network.at_best(arm) for arm in (SUBJECT, BASELINE)]
    if not all(runs and reached(runs) == len(runs) for runs in arms):
        return []
    steps = [Sample(tuple(run.steps_to_target for run in runs.values())).mean for runs in arms]
    seconds = [count * per_step.median for count, per_step in zip(steps, time, strict=True)]
    if not all(map(math.isfinite, seconds)):
        return []
    return [
        f"Steps to {q.percent(network.target)} times seconds per step: {q.duration(seconds[0])} of training "
        f"with it, {q.duration(seconds[1])} without, each at its best rate."
    ]


def _disturbance(time: list[Sample]) -> list[str]:
    worst = max((max(s.finite) / s.median for s in time if s.finite and s.median > 0), default=1.0)
    if worst < DISTURBED:
        return []
    return [
        f"The timing was disturbed: the slowest block of steps took {q.times(worst)} times the median. "
        "A quiet machine would tell more."
    ]
