"""Claims about training: is it faster, does it bear larger learning rates, does it generalize better?"""

from __future__ import annotations

import math
from collections.abc import Mapping

from batchnorm.study.verdicts import formatting as q
from batchnorm.study.verdicts.arms import BASELINE, SUBJECT, has_pair, in_words, is_normalized, rivals
from batchnorm.study.verdicts.results import Network, Run, Sample
from batchnorm.study.verdicts.significance import (
    MINIMAL_ACCURACY,
    MINIMAL_LOG_STEPS,
    WORKS_WITHIN,
    Claim,
    Comparison,
    Grade,
    compare,
)

Runs = Mapping[int, Run]


def faster(network: Network) -> Claim | None:
    """Steps to the target accuracy, at each arm's best rate and at equal rates."""
    if not has_pair(network):
        return None
    ours, theirs = network.at_best(SUBJECT), network.at_best(BASELINE)
    comparison = _compare_steps(network, ours, theirs)
    if not comparison.n or not (reached(ours) or reached(theirs)):
        return None
    target = q.percent(network.target)
    answer = (
        f"At its best learning rate ({_rate(ours)}), batch normalization reaches {target} held-out accuracy "
        f"{_steps(network, ours)}; without it the network does so {_steps(network, theirs)} "
        f"(best rate {_rate(theirs)}). {_ratio_in_words(comparison, ours, theirs)}."
    )
    details = []
    for rate in network.rates:
        with_it, without = network.at(SUBJECT, rate), network.at(BASELINE, rate)
        at_rate = _compare_steps(network, with_it, without)
        if at_rate.n and (reached(with_it) or reached(without)):
            word = at_rate.leans("faster with it", "slower with it", "no clear difference")
            ours_there, theirs_there = _steps(network, with_it), _steps(network, without)
            details.append(
                f"Both at rate {q.rate(rate)}: {ours_there} with it, {theirs_there} without: {word}."
            )
    return Claim(
        key="speed",
        label="Trains faster",
        question="Does it train faster?",
        grade=comparison.grade,
        figure=_ratio(comparison, ours, theirs),
        phrase=comparison.leans("trains faster", "trains slower", "trains about as fast"),
        answer=answer,
        details=tuple(details),
    )


def reached(runs: Runs) -> int:
    """How many runs got to the target."""
    return sum(math.isfinite(run.steps_to_target) for run in runs.values())


def steps_or_length(run: Run, length: float) -> float:
    """Steps to the target; the full length for a run that never got there, which understates it."""
    return run.steps_to_target if math.isfinite(run.steps_to_target) else length


def _compare_steps(network: Network, ours: Runs, theirs: Runs) -> Comparison:
    def minus_log_steps(run: Run) -> float:
        steps = steps_or_length(run, network.length)
        return -math.log(steps) if steps > 0 else math.nan

    return compare(ours, theirs, minus_log_steps, minimal=MINIMAL_LOG_STEPS)


def _steps(network: Network, runs: Runs) -> str:
    got_there, n = reached(runs), len(runs)
    if not got_there:
        which = "not once" if n == 1 else f"in none of {n} runs"
        return f"{which} within {q.count(network.length)} steps"
    sample = Sample(tuple(run.steps_to_target for run in runs.values()))
    text = f"in {q.spread(sample, q.count)} steps"
    return text if got_there == n else f"{text} (in {got_there} of {n} runs)"


def _ratio(comparison: Comparison, ours: Runs, theirs: Runs) -> str:
    if comparison.grade is Grade.UNCLEAR:
        return f"{_factor(-comparison.mean)}× the steps"
    at_least = "≥ " if _is_a_bound(comparison, ours, theirs) else ""
    more = "fewer" if comparison.mean >= 0 else "more"
    return f"{at_least}{_factor(abs(comparison.mean))}× {more} steps"


def _ratio_in_words(comparison: Comparison, ours: Runs, theirs: Runs) -> str:
    bound = "at least " if _is_a_bound(comparison, ours, theirs) else ""
    if comparison.grade is Grade.UNCLEAR:
        factor = _factor(comparison.mean)
        longer = "; longer training would tell" if bound else ""
        return (
            f"That is no clear difference{longer}: a factor of {bound}{factor} ({comparison.basis(_factor)})"
        )
    more = "fewer" if comparison.mean >= 0 else "more"
    side = 1 if comparison.mean >= 0 else -1
    facing = Comparison(tuple(side * d for d in comparison.differences), comparison.minimal)
    return f"That is {bound}{_factor(facing.mean)} times {more} ({facing.basis(_factor)})"


def _is_a_bound(comparison: Comparison, ours: Runs, theirs: Runs) -> bool:
    slower = theirs if comparison.mean >= 0 else ours
    return reached(slower) < len(slower)


def _factor(log_ratio: float, like: float | None = None, /) -> str:
    del like
    return q.times(math.exp(log_ratio)) if log_ratio < 12 else "over 100,000"


def _rate(runs: Runs) -> str:
    return q.rate(next((run.rate for run in runs.values()), math.nan))


def larger_rates(network: Network) -> Claim | None:
    """Accuracy at the largest rate at which either works, and the range of rates that work."""
    if not has_pair(network) or len(network.rates) < 2:
        return None
    works = {arm: working_rates(network, arm) for arm in (SUBJECT, BASELINE)}
    largest = max((rate for rates in works.values() for rate in rates), default=math.nan)
    ours, theirs = network.at(SUBJECT, largest), network.at(BASELINE, largest)
    comparison = compare(ours, theirs, lambda run: run.accuracy, minimal=MINIMAL_ACCURACY)
    if not comparison.n:
        return None
    both = all(largest in rates for rates in works.values())
    unclear = f"works up to a rate of {q.rate(largest)}, as the plain network does"
    answer = (
        f"{_who_works(works, largest)} at {q.rate(largest)}: held-out accuracy is "
        f"{_accuracy(ours)} with batch normalization and {_accuracy(theirs)} without, {_gain(comparison)}."
    )
    if largest == network.rates[-1]:
        answer += " That is the largest rate tried, so the limit lies beyond." if both else ""
    else:
        answer += f" Neither works at {q.rate(network.rates[-1])}."
    return Claim(
        key="rates",
        label="Tolerates larger rates",
        question="Does it tolerate larger learning rates?",
        grade=Grade.UNCLEAR if both and comparison.n > 1 else comparison.grade,
        figure=f"{q.points(comparison.mean)} at {q.rate(largest)}",
        phrase=unclear
        if both
        else comparison.leans(
            "tolerates larger learning rates", "tolerates large learning rates less well", unclear
        ),
        answer=answer,
        details=(_rates_that_work(network, works), *_divergence(network)),
    )


def working_rates(network: Network, arm: str) -> tuple[float, ...]:
    """Rates at which the arm comes within 2 points of the best mean that it or the plain network reached."""
    means = {
        (who, rate): _mean_accuracy(network.at(who, rate))
        for who in (SUBJECT, BASELINE)
        for rate in network.rates
    }
    best = max((mean for mean in means.values() if math.isfinite(mean)), default=math.nan)
    return tuple(rate for rate in network.rates if means.get((arm, rate), math.nan) >= best - WORKS_WITHIN)


def _who_works(works: Mapping[str, tuple[float, ...]], rate: float) -> str:
    able = [arm for arm, rates in works.items() if rate in rates]
    if len(able) == len(works):
        return "Both work"
    return "Only batch normalization works" if able == [SUBJECT] else "Only the plain network works"


def _rates_that_work(network: Network, works: Mapping[str, tuple[float, ...]]) -> str:
    near = q.points(WORKS_WITHIN).lstrip("+")
    parts = [
        f"{len(works[arm])} of {len(network.rates)} {who}"
        + (f" ({', '.join(map(q.rate, works[arm]))})" if works[arm] else "")
        for arm, who in ((SUBJECT, "with it"), (BASELINE, "without"))
    ]
    return f"Rates that work, within {near} of the best that either reached: {'; '.join(parts)}."


def _divergence(network: Network) -> list[str]:
    counts = {arm: network.diverged(arm) for arm in (SUBJECT, BASELINE)}
    if not any(counts.values()):
        return []
    total = {arm: sum(run.arm == arm for run in network.runs) for arm in counts}
    return [
        f"Diverged: {counts[SUBJECT]} of {total[SUBJECT]} runs with it, {counts[BASELINE]} of "
        f"{total[BASELINE]} without. A diverged run counts as an accuracy of 0."
    ]


def generalizes(network: Network) -> Claim | None:
    """Held-out accuracy at each arm's best rate, against every other arm that trains at all."""
    if SUBJECT not in network.arms:
        return None
    idle = [arm for arm in rivals(network) if hardly_trains(network, arm)]
    comparisons = {arm: accuracy_against(network, arm) for arm in rivals(network) if arm not in idle}
    comparisons = {arm: comparison for arm, comparison in comparisons.items() if comparison.n}
    if not comparisons:
        return None
    words = ("better than", "worse than", "no clear difference from")
    found = {
        word: [in_words(arm) for arm, comparison in comparisons.items() if comparison.leans(*words) == word]
        for word in words
    }
    summary = "; ".join(f"{word} {q.listed(names)}" for word, names in found.items() if names)
    better = found["better than"]
    ours = _accuracy(network.at_best(SUBJECT))
    answer = (
        f"Held-out accuracy with batch normalization is {ours} at its best rate. "
        f"{summary[0].upper()}{summary[1:]}, each at its own best rate."
    )
    details = [
        f"Against {in_words(arm)} ({_accuracy(network.at_best(arm))}): {_gain(comparison)}."
        for arm, comparison in comparisons.items()
    ]
    details.extend(_combinations(network))
    if idle:
        names = q.listed([f"{in_words(arm)} ({_accuracy(network.at_best(arm))})" for arm in idle])
        details.append(f"Not compared: with {names} the network hardly trains, with nothing to generalize.")
    return Claim(
        key="accuracy",
        label="Generalizes better",
        question=f"Does it generalize better than {_any_of([in_words(arm) for arm in comparisons])}?",
        grade=overall([comparison.grade for comparison in comparisons.values()]),
        figure=f"than {len(better)} of {len(comparisons)}"
        if len(comparisons) > 1
        else _one_figure(comparisons),
        phrase=_phrase(found),
        answer=answer,
        details=tuple(details),
    )


def hardly_trains(network: Network, arm: str) -> bool:
    """Whether the arm's accuracy on its own training data stays below half of batch normalization's."""
    ours, theirs = (
        Sample(
            tuple(0.0 if run.diverged else run.train_accuracy for run in network.at_best(who).values())
        ).mean
        for who in (SUBJECT, arm)
    )
    return theirs < ours / 2


def accuracy_against(network: Network, arm: str) -> Comparison:
    """Held-out accuracy of batch normalization less that of another arm, seed by seed, at best rates."""
    return compare(
        network.at_best(SUBJECT), network.at_best(arm), lambda run: run.accuracy, minimal=MINIMAL_ACCURACY
    )


def overall(grades: list[Grade]) -> Grade:
    """One grade for a claim over several rivals: supported only if it holds against every one."""
    for one in (Grade.INDICATION, Grade.SUPPORTED, Grade.AGAINST, Grade.UNCLEAR):
        if all(grade is one for grade in grades):
            return one
    if Grade.SUPPORTED in grades:
        return Grade.PARTLY
    return Grade.AGAINST if Grade.AGAINST in grades else Grade.UNCLEAR


def _mean_accuracy(runs: Runs) -> float:
    return Sample(tuple(run.accuracy for run in runs.values())).mean


def _combinations(network: Network) -> list[str]:
    lines = []
    for arm in network.arms:
        comparison = accuracy_against(network, arm)
        if arm != SUBJECT and is_normalized(arm) and comparison.n:
            gain = Comparison(tuple(-d for d in comparison.differences), comparison.minimal)
            lines.append(f"{arm} in place of batch normalization alone: {_gain(gain)}.")
    return lines


def _phrase(found: dict[str, list[str]]) -> str:
    better, worse = found["better than"], found["worse than"]
    if not better and not worse:
        return "generalizes about as well as " + _any_of(found["no clear difference from"])
    parts = [
        f"generalizes {word} {q.listed(names)}"
        for word, names in found.items()
        if names and names in (better, worse)
    ]
    return " and ".join(parts)


def _one_figure(comparisons: dict[str, Comparison]) -> str:
    return "".join(f"{q.points(comparison.mean)} against {arm}" for arm, comparison in comparisons.items())


def _any_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _accuracy(runs: Runs) -> str:
    finite = Sample(tuple(run.accuracy for run in runs.values() if not run.diverged))
    lost = sum(run.diverged for run in runs.values())
    if lost == len(runs):
        return "nothing (every run diverged)" if lost > 1 else "nothing (the run diverged)"
    text = q.spread(finite, q.percent)
    return f"{text} ({lost} of {len(runs)} diverged)" if lost else text


def _gain(comparison: Comparison) -> str:
    return f"{q.points(comparison.mean)} ({comparison.basis(q.points)})"
