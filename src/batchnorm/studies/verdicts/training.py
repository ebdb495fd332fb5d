"""Claims about training: is it faster, does it bear larger learning rates, does it generalize better?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from batchnorm.studies.records import NAN, Run

from . import formatting as q
from .results import BASELINE, SUBJECT, Network, Runs, Sample, is_normalized, sample
from .significance import (
    MINIMAL_ACCURACY,
    MINIMAL_LOG_STEPS,
    WORKS_WITHIN,
    Claim,
    Comparison,
    Grade,
    compare,
    compare_in_blocks,
)

_WORDS = {
    "none": "no normalization",
    "batchnorm": "batch normalization",
    "layernorm": "layer normalization",
    "l1": "L1",
    "l2": "L2",
    "batchnorm+dropout": "batch normalization with dropout",
}


def faster(network: Network, ours: Runs, theirs: Runs) -> Claim | None:
    """Judges steps to the target accuracy, at each arm's best rate and at equal rates."""
    comparison = _compare_steps(network, ours, theirs)
    if not comparison.n or not (reached(ours) or reached(theirs)):
        return None
    target = q.percent(network.target)
    answer = (
        f"At its best learning rate ({_rate(ours)}), batch normalization reaches {target} held-out accuracy "
        f"{_steps(network, ours)}; without it the network does so {_steps(network, theirs)} "
        f"(best rate {_rate(theirs)}). {_ratio_in_words(comparison, ours, theirs)}."
    )
    details, blocks = [], []
    for rate in network.rates:
        with_it, without = network.at(SUBJECT, rate), network.at(BASELINE, rate)
        at_rate = _compare_steps(network, with_it, without)
        if at_rate.n and (reached(with_it) or reached(without)):
            blocks.append((with_it, without))
            word = at_rate.leans("faster with it", "slower with it", "no clear difference")
            each = f"{_steps(network, with_it)} with it, {_steps(network, without)} without"
            details.append(f"Both at rate {q.rate(rate)}: {each}: {word}.")
    if len(blocks) > 1:
        in_blocks = compare_in_blocks(blocks, _minus_log_steps(network), minimal=MINIMAL_LOG_STEPS)
        if in_blocks.n:
            rates = f"At equal rates, averaged over the {len(blocks)} at which either gets there"
            facing = in_blocks.facing
            told = f"{_factor(facing.mean)} times {_more(in_blocks)} steps ({facing.basis(_factor)})"
            word = in_blocks.leans("faster with it", "slower with it", "no clear difference")
            details.append(f"{rates}: {told}: {word}.")
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
    """Returns how many runs got to the target."""
    return len(sample(runs, "steps_to_target").finite)


def _compare_steps(network: Network, ours: Runs, theirs: Runs) -> Comparison:
    return compare(ours, theirs, _minus_log_steps(network), minimal=MINIMAL_LOG_STEPS)


def _minus_log_steps(network: Network) -> Callable[[Run], float]:
    def measure(run: Run) -> float:
        # A run that never reached the target counts with its full length, which is less than it needs.
        steps = run.steps_to_target if math.isfinite(run.steps_to_target) else network.length
        return -math.log(steps) if steps > 0 else NAN

    return measure


def _steps(network: Network, runs: Runs) -> str:
    got_there, n = reached(runs), len(runs)
    if not got_there:
        which = "not once" if n == 1 else f"in none of {n} runs"
        return f"{which} within {q.count(network.length)} steps"
    text = f"in {q.spread(sample(runs, 'steps_to_target'), q.count)} steps"
    return text if got_there == n else f"{text} (in {got_there} of {n} runs)"


def _ratio(comparison: Comparison, ours: Runs, theirs: Runs) -> str:
    if comparison.grade is Grade.UNCLEAR:
        return f"{_factor(-comparison.mean)}× the steps"
    at_least = "≥ " if _is_a_bound(comparison, ours, theirs) else ""
    return f"{at_least}{_factor(comparison.facing.mean)}× {_more(comparison)} steps"


def _ratio_in_words(comparison: Comparison, ours: Runs, theirs: Runs) -> str:
    bound = "at least " if _is_a_bound(comparison, ours, theirs) else ""
    if comparison.grade is Grade.UNCLEAR:
        longer = "; longer training would tell" if bound else ""
        factor = f"{bound}{_factor(comparison.mean)} ({comparison.basis(_factor)})"
        return f"That is no clear difference{longer}: a factor of {factor}"
    facing = comparison.facing
    return f"That is {bound}{_factor(facing.mean)} times {_more(comparison)} ({facing.basis(_factor)})"


def _more(comparison: Comparison) -> str:
    return "fewer" if comparison.mean >= 0 else "more"


def _is_a_bound(comparison: Comparison, ours: Runs, theirs: Runs) -> bool:
    slower = theirs if comparison.mean >= 0 else ours
    return reached(slower) < len(slower)


def _factor(log_ratio: float, _: float | None = None, /) -> str:
    return q.times(math.exp(log_ratio)) if log_ratio < 12 else "over 100,000"


def _rate(runs: Runs) -> str:
    return q.rate(next((run.learning_rate for run in runs.values()), NAN))


def larger_rates(network: Network, *_: Runs) -> Claim | None:
    """Judges accuracy at the largest rate at which either works, and the range of rates that work."""
    if len(network.rates) < 2:
        return None
    works = {arm: working_rates(network, arm) for arm in (SUBJECT, BASELINE)}
    largest = max((rate for rates in works.values() for rate in rates), default=NAN)
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
    lean = comparison.leans(
        "tolerates larger learning rates", "tolerates large learning rates less well", unclear
    )
    return Claim(
        key="rates",
        label="Tolerates larger rates",
        question="Does it tolerate larger learning rates?",
        grade=Grade.UNCLEAR if both and comparison.n > 1 else comparison.grade,
        figure=f"{q.points(comparison.mean)} at {q.rate(largest)}",
        phrase=unclear if both else lean,
        answer=answer,
        details=(_rates_that_work(network, works), *_divergence(network)),
    )


def working_rates(network: Network, arm: str) -> tuple[float, ...]:
    """Returns the rates at which the arm comes within 2 points of the best mean of it and `none`."""
    means = {
        (who, rate): sample(network.at(who, rate), "accuracy").mean
        for who in (SUBJECT, BASELINE)
        for rate in network.rates
    }
    best = max((mean for mean in means.values() if math.isfinite(mean)), default=NAN)
    return tuple(rate for rate in network.rates if means.get((arm, rate), NAN) >= best - WORKS_WITHIN)


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
    lost = [network.diverged(arm) for arm in (SUBJECT, BASELINE)]
    runs = [sum(run.arm == arm for run in network.runs) for arm in (SUBJECT, BASELINE)]
    counts = f"{lost[0]} of {runs[0]} runs with it, {lost[1]} of {runs[1]} without"
    return [f"Diverged: {counts}. A diverged run counts as an accuracy of 0."] if any(lost) else []


def generalizes(network: Network) -> Claim | None:
    """Judges held-out accuracy at each arm's best rate, against every other arm that trains at all."""
    if SUBJECT not in network.arms:
        return None
    idle = [arm for arm in network.rivals if hardly_trains(network, arm)]
    comparisons = {arm: accuracy_against(network, arm) for arm in network.rivals if arm not in idle}
    comparisons = {arm: comparison for arm, comparison in comparisons.items() if comparison.n}
    if not comparisons:
        return None
    words = ("better than", "worse than", "no clear difference from")
    found = {
        word: [_in_words(arm) for arm, comparison in comparisons.items() if comparison.leans(*words) == word]
        for word in words
    }
    better = found["better than"]
    summary = "; ".join(f"{word} {q.listed(names)}" for word, names in found.items() if names)
    answer = (
        f"Held-out accuracy with batch normalization is {_accuracy(network.at_best(SUBJECT))} at its best "
        f"rate. {summary[0].upper()}{summary[1:]}, each at its own best rate."
    )
    details = [
        f"Against {_in_words(arm)} ({_accuracy(network.at_best(arm))}): {_gain(comparison)}."
        for arm, comparison in comparisons.items()
    ]
    details.extend(_combinations(network))
    if idle:
        names = q.listed([f"{_in_words(arm)} ({_accuracy(network.at_best(arm))})" for arm in idle])
        details.append(f"Not compared: with {names} the network hardly trains, with nothing to generalize.")
    many = f"than {len(better)} of {len(comparisons)}"
    one = "".join(f"{q.points(comparison.mean)} against {arm}" for arm, comparison in comparisons.items())
    return Claim(
        key="accuracy",
        label="Generalizes better",
        question=f"Does it generalize better than {q.listed(list(map(_in_words, comparisons)), 'or')}?",
        grade=overall([comparison.grade for comparison in comparisons.values()]),
        figure=many if len(comparisons) > 1 else one,
        phrase=_phrase(found),
        answer=answer,
        details=tuple(details),
    )


def _in_words(arm: str) -> str:
    """Returns an arm's name as it stands in a sentence."""
    return _WORDS.get(arm, arm)


def hardly_trains(network: Network, arm: str) -> bool:
    """Returns whether the arm's accuracy on its training data stays below half of batch normalization's."""
    ours, theirs = (
        Sample([0.0 if run.diverged else run.train_accuracy for run in network.at_best(who).values()]).mean
        for who in (SUBJECT, arm)
    )
    return theirs < ours / 2


def accuracy_against(network: Network, arm: str) -> Comparison:
    """Compares held-out accuracy of batch normalization with that of another arm, at best rates."""
    return compare(
        network.at_best(SUBJECT), network.at_best(arm), lambda run: run.accuracy, minimal=MINIMAL_ACCURACY
    )


def overall(grades: list[Grade]) -> Grade:
    """Returns one grade for a claim over several rivals: supported only if it holds against every one."""
    for one in (Grade.INDICATION, Grade.SUPPORTED, Grade.AGAINST, Grade.UNCLEAR):
        if all(grade is one for grade in grades):
            return one
    if Grade.SUPPORTED in grades:
        return Grade.PARTLY
    return Grade.AGAINST if Grade.AGAINST in grades else Grade.UNCLEAR


def _combinations(network: Network) -> list[str]:
    found = {
        arm: accuracy_against(network, arm).reversed
        for arm in network.arms
        if is_normalized(arm) and arm != SUBJECT
    }
    return [
        f"{arm} in place of batch normalization alone: {_gain(gain)}."
        for arm, gain in found.items()
        if gain.n
    ]


def _phrase(found: dict[str, list[str]]) -> str:
    *clear, (_, alike) = found.items()
    parts = [f"{word} {q.listed(names)}" for word, names in clear if names]
    if not parts:
        return f"generalizes about as well as {q.listed(alike, 'or')}"
    return " and ".join(f"generalizes {part}" for part in parts)


def _accuracy(runs: Runs) -> str:
    finished = {seed: run for seed, run in runs.items() if not run.diverged}
    lost = len(runs) - len(finished)
    if lost == len(runs):
        return "nothing (every run diverged)" if lost > 1 else "nothing (the run diverged)"
    text = q.spread(sample(finished, "accuracy"), q.percent)
    return f"{text} ({lost} of {len(runs)} diverged)" if lost else text


def _gain(comparison: Comparison) -> str:
    return f"{q.points(comparison.mean)} ({comparison.basis(q.points)})"
