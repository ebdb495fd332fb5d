"""Claims about what goes on inside: gradients through a deep network, and inputs of layers that move."""

from __future__ import annotations

import math
from statistics import median

from batchnorm.studies.records import NAN, Moments, Run

from . import formatting as q
from .results import BASELINE, Network, Runs, Sample
from .significance import MINIMAL_LOG_DRIFT, MINIMAL_LOG_GRADIENT, Claim, Comparison, compare
from .training import hardly_trains

# With fewer layers than this there is no depth for a gradient to vanish in.
DEEP = 4
# The smallest gradient norm that float32 can hold: stands in for an exact zero under the logarithm.
SMALLEST = 1.4e-45

_HARDLY_TRAINS = (
    "Without batch normalization this network hardly trains: how far its inputs move then says little."
)
_NOT_THE_CAUSE = (
    "Steadier inputs need not be why a network trains well: Santurkar et al. (2018, arXiv:1805.11604) could "
    "have one without the other."
)


def log_gradient_ratio(run: Run) -> float:
    """Returns the median over steps of log(gradient norm of the first layer / of the last)."""
    layers = list(run.gradient_norm.layers.values())
    if len(layers) < 2:
        return NAN
    ratios = [
        math.log(max(first, SMALLEST) / max(last, SMALLEST))
        for first, last in zip(layers[0], layers[-1], strict=True)
        if math.isfinite(first) and math.isfinite(last) and max(first, last) > 0
    ]
    return median(ratios) if ratios else NAN


def gradients(_: Network, ours: Runs, theirs: Runs) -> Claim | None:
    """Judges how evenly the gradient reaches the first layer and the last."""
    depth = min((len(run.gradient_norm.layers) for run in (*ours.values(), *theirs.values())), default=0)
    comparison = compare(
        ours, theirs, lambda run: -abs(log_gradient_ratio(run)), minimal=MINIMAL_LOG_GRADIENT
    )
    if depth < DEEP or not comparison.n:
        return None
    with_it, without = (typical_gradient_ratio(runs) for runs in (ours, theirs))
    word = comparison.leans("More even with it", "Less even with it", "No clear difference")
    answer = (
        f"As the median over training ({depth} layers, best rates), the gradient of the first "
        f"layer is {q.times(without)} of that of the last without batch normalization and {q.times(with_it)} "
        f"with it, where 1 would be perfectly even. {word}{_by(comparison)}."
    )
    return Claim(
        key="gradients",
        label="Keeps gradients alive",
        question="Does it keep gradients alive in a deep network?",
        grade=comparison.grade,
        figure=f"first over last layer: {q.times(with_it)} with it, {q.times(without)} without",
        phrase=comparison.leans(
            "keeps gradients alive", "makes gradients less even", "leaves gradients about as even"
        ),
        answer=answer,
    )


def typical_gradient_ratio(runs: Runs) -> float:
    """Returns gradient norm of the first layer / of the last: the geometric mean over runs."""
    logs = Sample([log_gradient_ratio(run) for run in runs.values()])
    return math.exp(logs.mean)


def total_drift(run: Run) -> float:
    """Returns the mean over layers of how far their inputs are from the start, in units of their spread."""
    found = Sample([layer_drift(moments) for moments in moving_layers(run).values()])
    return NAN if run.diverged else found.mean


def moving_layers(run: Run) -> dict[str, Moments]:
    """Returns the layers whose input can drift: all but the first, whose input is the data."""
    return dict(list(run.input_drift.layers.items())[1:])


def layer_drift(drift: Moments) -> float:
    """Returns the mean distance of (mean, spread) from the first one, in units of the mean spread."""
    moments = [(m, s) for m, s in zip(drift.mean, drift.std, strict=True) if math.isfinite(m + s)]
    if len(moments) < 2:
        return NAN
    start_mean, start_std = moments[0]
    scale = sum(s for _, s in moments) / len(moments)
    away = [math.hypot(m - start_mean, s - start_std) for m, s in moments[1:]]
    return sum(away) / len(away) / scale if scale > 0 else NAN


def drift(network: Network, ours: Runs, theirs: Runs) -> Claim | None:
    """Judges how far the distribution of the layers' inputs moves during training."""

    def minus_log_drift(run: Run) -> float:
        moved = total_drift(run)
        return -math.log(moved) if moved > 0 else NAN

    comparison = compare(ours, theirs, minus_log_drift, minimal=MINIMAL_LOG_DRIFT)
    if not comparison.n:
        return None
    samples = [Sample([total_drift(run) for run in runs.values()]) for runs in (ours, theirs)]
    with_it, without = (q.spread(sample, q.times) for sample in samples)
    word = comparison.leans("They move less", "They move more", "No clear difference")
    answer = (
        "Averaged over training and over the hidden layers, the mean and spread of a layer's input are "
        f"{with_it} standard deviations away from where they started with batch normalization, and {without} "
        f"without (best rates). {word}{_by(comparison)}."
    )
    return Claim(
        key="drift",
        label="Steadies layer inputs",
        question="Do the inputs of layers move less?",
        grade=comparison.grade,
        figure=f"inputs move {q.times(samples[0].mean)} std with it, {q.times(samples[1].mean)} without",
        phrase=comparison.leans(
            "steadies the inputs of layers",
            "lets the inputs of layers move more",
            "lets the inputs of layers move as much",
        ),
        answer=answer,
        details=((_HARDLY_TRAINS,) if hardly_trains(network, BASELINE) else ()) + (_NOT_THE_CAUSE,),
    )


def _by(comparison: Comparison) -> str:
    def factor(log_ratio: float, _: float | None = None, /) -> str:
        return q.times(math.exp(log_ratio)) if log_ratio < 30 else "over 10¹³"

    facing = comparison.facing
    return f" (factor {factor(facing.mean)}, {facing.basis(factor)})"
