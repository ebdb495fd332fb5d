"""Claims about use: which statistics serve at test time, and what a training step costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import formatting as q
from .results import (
    BASELINE,
    KINDS_OF_TEST_STATISTICS,
    STOCK,
    SUBJECT,
    UNMASKED,
    Network,
    Runs,
    Sample,
    Summary,
    sample,
)
from .significance import MINIMAL_ACCURACY, Claim, Comparison, Grade
from .training import accuracy_against, reached

# A block of steps that takes this many times the median says that the machine had other work.
DISTURBED = 3.0


def statistics_at_test_time(network: Network) -> Claim | None:
    """Judges held-out accuracy under batch, running and calibrated statistics."""
    found = accuracies_at_test_time(network.at_best(SUBJECT))
    complete = [row for row in zip(*found.values(), strict=True) if all(map(math.isfinite, row))]
    if not complete:
        return None
    of_calibrating = Comparison(tuple(c - r for _, r, c in complete), MINIMAL_ACCURACY)
    of_batch = Comparison(tuple(b - r for b, r, _ in complete), MINIMAL_ACCURACY)
    batch, running, calibrated = (
        q.spread(Sample(column), q.percent) for column in zip(*complete, strict=True)
    )
    answer = (
        f"Held-out accuracy of the same trained networks is {running} with the running statistics, "
        f"{calibrated} with statistics calibrated over the training data, {batch} with those of each test "
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


def padding(network: Network) -> Claim | None:
    """Compares the masked with the unmasked norm, and tells how far predictions of each arm move."""
    if SUBJECT not in network.arms or UNMASKED not in network.arms:
        return None
    found = accuracy_against(network, UNMASKED)
    if not found.n:
        return None
    ours, theirs = (
        q.spread(sample(network.at_best(arm), "accuracy"), q.percent) for arm in (SUBJECT, UNMASKED)
    )
    word = found.leans("better", "worse", "no clear difference")
    gain = f"{q.points(found.mean)} ({found.basis(q.points)})"
    return Claim(
        key="padding",
        label="Gains by masking padding",
        question="Padding: is the norm better that leaves it out of its statistics?",
        grade=found.grade,
        figure=q.points(found.mean),
        phrase=found.leans(
            "gains by leaving out padding",
            "loses by leaving out padding",
            "is about as accurate with padding in its statistics as without",
        ),
        answer=f"Held-out accuracy is {ours} with padding left out of the statistics (batchnorm) and "
        f"{theirs} with padding in them ({UNMASKED}): {gain}, {word}.",
        details=_movements(network),
    )


def _movements(network: Network) -> tuple[str, ...]:
    """Returns a sentence per kind of statistics, with a number per arm."""
    served = {
        "running": "With the running statistics, as deployed",
        "batch": "With the statistics of each batch, as in training",
    }
    sentences = []
    for kind, how in served.items():
        for cause, what in (("by_mates", "in other batches"), ("by_padding", "with 20 % more padding")):
            moved = {
                arm: Sample(
                    tuple(
                        getattr(getattr(run.movements, kind), cause)
                        for run in network.at_best(arm).values()
                        if run.movements is not None
                    )
                )
                for arm in network.arms
            }
            numbers = [f"{arm} {q.percent(one.mean)}" for arm, one in moved.items() if one.finite]
            if numbers:
                sentences.append(f"{how}, {what}: {', '.join(numbers)}.")
    meaning = (
        "How far a prediction moves: the share of its probability that goes to other classes, averaged over "
        "held-out examples that are served twice."
    )
    return (meaning, *sentences) if sentences else ()


def accuracies_at_test_time(runs: Runs) -> dict[str, list[float]]:
    """Returns the accuracy of each run that did not diverge, by kind of statistics."""
    found = [run.test_time_statistics for run in runs.values() if not run.diverged]
    return {
        kind: [math.nan if one is None else getattr(one, kind) for one in found]
        for kind in KINDS_OF_TEST_STATISTICS
    }


def cost(network: Network, *pair: Runs) -> Claim | None:
    """Tells seconds and bytes of a training step, with and without batch normalization."""
    ours, theirs = network.summary(SUBJECT), network.summary(BASELINE)
    time = ours.seconds_per_step, theirs.seconds_per_step
    kept = ours.bytes_kept_for_backward, theirs.bytes_kept_for_backward
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
    sentences += _beside_stock(ours, network.summary(STOCK))
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
        details=(*_time_to_target(network, pair, time), *_disturbance(time)),
    )


def _beside_stock(ours: Summary, stock: Summary) -> list[str]:
    """Tells the same with the framework's own layer, where it was timed."""
    time, kept = stock.seconds_per_step, stock.bytes_kept_for_backward
    if not time.median > 0:
        return []
    told = f"takes {q.duration(time.median)}"
    factors = f"{q.times(time_ratio(ours.seconds_per_step, time))} times its time"
    if kept.mean > 0 and ours.bytes_kept_for_backward.mean > 0:
        told += f" and keeps {q.megabytes(kept.mean)}"
        factors += f" and {q.times(ours.bytes_kept_for_backward.mean / kept.mean)} times its memory"
    return [f"With the framework's own layer a step {told}: ours takes {factors}."]


def time_ratio(ours: Sample, theirs: Sample) -> float:
    """Returns the ratio of times: the median over pairs timed in turn, else of medians."""
    if len(ours.values) != len(theirs.values):
        return ours.median / theirs.median
    pairs = zip(ours.values, theirs.values, strict=True)
    return Sample(tuple(a / b for a, b in pairs if b > 0)).median


def _time_to_target(network: Network, pair: Sequence[Runs], time: Sequence[Sample]) -> list[str]:
    if not all(runs and reached(runs) == len(runs) for runs in pair):
        return []
    steps = [sample(runs, "steps_to_target").mean for runs in pair]
    seconds = [count * per_step.median for count, per_step in zip(steps, time, strict=True)]
    if not all(map(math.isfinite, seconds)):
        return []
    return [
        f"Steps to {q.percent(network.target)} times seconds per step: {q.duration(seconds[0])} of training "
        f"with it, {q.duration(seconds[1])} without, each at its best rate."
    ]


def _disturbance(time: Sequence[Sample]) -> list[str]:
    worst = max((max(s.finite) / s.median for s in time if s.finite and s.median > 0), default=1.0)
    if worst < DISTURBED:
        return []
    return [
        f"The timing was disturbed: the slowest block of steps took {q.times(worst)} times the median. "
        "A quiet machine would tell more."
    ]
