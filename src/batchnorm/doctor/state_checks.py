"""Checks one norm by its own state: running statistics, weight and bias, momentum."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from . import thresholds as t
from .findings import Evidence, Finding, Severity
from .records import NormState
from .remedies import Remedies


def check_state(norm: NormState, remedies: Remedies, *, is_trained: bool) -> list[Finding]:
    """Return what is wrong with the state of a norm.

    Args:
        norm: as it is.
        remedies: of its framework.
        is_trained: whether the weights around it were trained.
    """
    if norm.unreadable:
        why = "Nothing can be said of a layer without values."
        remedy = remedies.calibrate()
        return [Finding("note", "unreadable", norm.name, norm.unreadable, why, remedy, short=norm.unreadable)]
    found = list(_statistics(norm, remedies, is_trained))
    found += _updates(norm, remedies)
    found += _parameters(norm, remedies)
    return found


def _statistics(norm: NormState, remedies: Remedies, is_trained: bool) -> Iterator[Finding]:
    mean, var = norm.mean, norm.var
    if mean is None or var is None:
        return
    if norm.is_initial and (is_trained or not norm.batches):
        yield _never_updated(norm, remedies, is_trained)
        return
    unusable = ~(np.isfinite(mean) & np.isfinite(var))
    channels: tuple[tuple[Severity, str, str, NDArray[np.bool_], str], ...] = (
        (
            "serious",
            "nonfinite-statistics",
            "NaN or inf",
            unusable,
            "Every output in evaluation is NaN there.",
        ),
        (
            "serious",
            "negative-variance",
            "negative variance",
            var < 0,
            "No data has such a variance, and the square root of it is NaN.",
        ),
        (
            "likely" if bool((var == 0).all()) else "note",
            "zero-variance",
            "zero variance",
            var == 0,
            f"What was constant in training is multiplied by 1 / sqrt(eps) = {norm.eps**-0.5:.3g} once it "
            "is not."
            if norm.eps > 0
            else "What was constant in training is divided by 0.",
        ),
        (
            "likely",
            "huge-variance",
            "huge variance",
            (var > t.HUGE_VARIANCE) & ~unusable,
            "A single batch of broken data stays in the average for long, and makes outputs nearly constant.",
        ),
    )
    for severity, check, what, wrong, why in channels:
        if wrong.any():
            yield _counted(norm, severity, check, what, wrong, why, remedies.calibrate())
    if norm.dtype in ("float16", "bfloat16"):
        yield Finding(
            "likely",
            "half-statistics",
            norm.name,
            f"its running statistics are {norm.dtype}",
            "An update smaller than half a unit in the last place is lost, and a variance above 65504 is "
            "inf in "
            "float16.",
            remedies.widen(),
            {"dtype": norm.dtype},
            f"{norm.dtype} statistics",
        )


def _never_updated(norm: NormState, remedies: Remedies, is_trained: bool) -> Finding:
    counted = f", with {norm.batches} batches counted" if norm.batches else ""
    beside = ", beside trained weights" if is_trained else ""
    return Finding(
        "serious" if is_trained else "note",
        "never-updated",
        norm.name,
        f"its running mean is 0 and its running variance 1 in every channel{counted}{beside}",
        "In evaluation it does not normalize at all: no data has these statistics."
        if is_trained
        else "In evaluation it does not normalize yet, as before any training.",
        remedies.calibrate(),
        {"batches": norm.batches or 0},
        "never updated",
    )


def _updates(norm: NormState, remedies: Remedies) -> Iterator[Finding]:
    momentum = norm.momentum
    if not norm.is_tracked or not norm.moves or momentum is None:
        return
    if momentum >= t.MOMENTUM_LIKELY:
        is_reversed = momentum >= t.MOMENTUM_SERIOUS
        batches = (2 - momentum) / momentum
        other = round(1 - momentum, 6)
        yield Finding(
            "serious" if is_reversed and norm.batches else "likely",
            "momentum",
            norm.name,
            f"the last batch makes up {100 * momentum:.3g} % of its running statistics, which average over "
            f"{batches:.2g} batches",
            "In evaluation it uses the statistics of whatever batch came last; torch's momentum is 1 minus "
            "Keras's and TensorFlow's.",
            remedies.momentum(norm.name, other if 0 < other < 0.5 else 0.1),
            {"momentum": momentum, "batches_averaged": batches},
            "momentum of the last batch",
        )
        return
    if not norm.batches or norm.var is None or norm.warm_start:
        return
    share = (1 - momentum) ** norm.batches
    # Batches add to the variance: one below the share of the initial 1 has come from elsewhere.
    if share > t.PRIOR_NOTE and bool((norm.var >= share).all()):
        yield Finding(
            "likely" if share > t.PRIOR_LIKELY else "note",
            "prior",
            norm.name,
            f"after {norm.batches} updates, {100 * share:.2g} % of its running statistics are the initial "
            "0 and 1",
            "Averages that begin at 0 and 1 are biased towards them until enough batches have come.",
            remedies.calibrate(),
            {"share": share, "updates": norm.batches},
            "initial values in the statistics",
        )


def _parameters(norm: NormState, remedies: Remedies) -> Iterator[Finding]:
    for what, values in (("weight", norm.weight), ("bias", norm.bias)):
        if values is not None and not np.isfinite(values).all():
            why = "Every output is NaN there, in every mode."
            remedy = remedies.reset_parameters(norm.name)
            what = f"NaN or inf in {what}"
            yield _counted(norm, "serious", "nonfinite-parameters", what, ~np.isfinite(values), why, remedy)
    if norm.weight is None or not np.isfinite(norm.weight).all():
        return
    dead = dead_channels(norm.weight)
    if dead.any():
        yield _dead(norm, dead, remedies)


def dead_channels(weight: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which channels have a weight of 0, or next to 0 beside the others, `[C]`."""
    size = np.abs(weight)
    dead: NDArray[np.bool_] = (size == 0) | (size < t.DEAD * np.median(size))
    return dead


def _dead(norm: NormState, dead: NDArray[np.bool_], remedies: Remedies) -> Finding:
    share = float(dead.mean())
    alive = 0 if norm.bias is None else int((norm.bias[dead] != 0).sum())
    # residual branches often start at a weight of 0
    is_initial = share == 1.0 and (norm.bias is None or not norm.bias.any())
    told = f"{int(dead.sum())} of {dead.size} channels have a weight of 0, or next to 0"
    if alive:
        told += f", and {alive} of these a bias: their output is that constant, not 0"
    return Finding(
        "likely" if share >= t.DEAD_LIKELY and not is_initial else "note",
        "dead-channels",
        norm.name,
        told,
        "Such a channel tells the next layer nothing of its input, costs what all channels cost, and a "
        "weight "
        "of 0 gives NaN in quantization-aware training; folded, it is a constant in the next bias.",
        remedies.fold(),
        {"dead": int(dead.sum()), "channels": dead.size, "share": share, "with_bias": alive},
        f"dead weight ({int(dead.sum())} of {dead.size})",
    )


def _counted(
    norm: NormState,
    severity: Severity,
    check: str,
    what: str,
    wrong: NDArray[np.bool_],
    why: str,
    remedy: str,
) -> Finding:
    evidence: Evidence = {"channels": int(wrong.sum()), "of": wrong.size}
    short = f"{what} ({int(wrong.sum())} of {wrong.size})"
    told = f"{what} in {int(wrong.sum())} of {wrong.size} channels"
    return Finding(severity, check, norm.name, told, why, remedy, evidence, short)
