"""Checks what the samples show: the gap between statistics, batches, padding, magnitudes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from . import thresholds as t
from .findings import Finding, LayerGap, Severity
from .measurements import Measured, Received, Score, distance_of_statistics
from .records import ModelState, NormState
from .remedies import Remedies, remedies_of


def check_data(model: ModelState, measured: Measured) -> tuple[list[Finding], tuple[LayerGap, ...]]:
    """Return what is wrong on the samples, and the comparison of each layer."""
    remedies = remedies_of(model.framework)
    norms = {norm.name: norm for norm in model.norms}
    with np.errstate(all="ignore"):  # of what is not finite, every number is NaN
        layers = tuple(
            _layer(norms[name], of, measured) for name, of in measured.received.items() if name in norms
        )
        found = [*_gap(model, measured, layers, remedies), *_whole(model, measured, remedies)]
        for layer in layers:
            found += _off(norms[layer.layer], layer, measured, remedies)
            found += _magnitudes(norms[layer.layer], measured.received[layer.layer], remedies)
            found += _calls(norms[layer.layer], measured.received[layer.layer], remedies)
            if min(part.count for part in measured.received[layer.layer].batches) < 2:
                found.append(_one_value(layer.layer, remedies))
        found += _batches(layers, measured, norms, remedies)
    return found, layers


def _layer(norm: NormState, received: Received, measured: Measured) -> LayerGap:
    found = measured.population.get(norm.name)
    mean_off, std_ratio = 0.0, 1.0
    if norm.mean is not None and norm.var is not None and found is not None and found.count > 1:
        mean_off, std_ratio = distance_of_statistics(
            found.mean, found.m2 / found.count, (norm.mean, norm.var), norm.eps
        )
    cost = None
    if norm.name in measured.alone:
        cost = _gain(measured.scores["running"], measured.alone[norm.name])
    noise = received.noise(norm.eps)
    values = float(np.mean([part.count for part in received.batches]))
    return LayerGap(norm.name, mean_off, std_ratio, cost, None if noise is None else noise[0], values)


def _gain(before: Score, after: Score) -> float:
    """Return what a change gains: accuracy, or share of the loss or difference."""
    if before.correct is not None:
        return after.value - before.value
    return (before.value - after.value) / before.value if before.value else 0.0


def _gap(
    model: ModelState, measured: Measured, layers: tuple[LayerGap, ...], remedies: Remedies
) -> Iterator[Finding]:
    if "population" not in measured.scores:
        return
    severity = _gap_severity(measured, "population")
    if severity is None:
        yield from _needs_batches(measured, remedies)
        return
    if not any(norm.is_trained for norm in model.norms) and all(norm.is_initial for norm in model.norms):
        severity = "note"  # an untrained model: its statistics are of no data yet
    values = {name: score.value for name, score in measured.scores.items()}
    gain = _gain(measured.scores["running"], measured.scores["population"])
    best = max(layers, key=lambda layer: layer.cost or 0.0, default=None)
    told = f"{measured.measure} is {_shown(values['running'], measured)} by the running statistics and " + (
        f"{_shown(values['population'], measured)} by those of the samples"
        if measured.measure != "difference of outputs"
        else "would be 0 by those of the samples"
    )
    if best is not None and best.cost:
        told += f"; {best.layer} alone makes up {_shown(best.cost, measured)} of it"
    remedy = remedies.calibrate()
    adapted = measured.scores.get("adapted")
    if adapted is not None and measured.measure != "difference of outputs":
        told += f"; {_shown(adapted.value, measured)} by Adapted(prior=16)"
        remedy += f"  # on data of training; where only these samples are other: {remedies.adapt()}"
    yield Finding(
        severity,
        "gap",
        None,
        told,
        "The running statistics are not those of this data and these weights: stale, of noisy batches, or of "
        "another distribution.",
        remedy,
        {**values, "gain": gain},
    )


def _needs_batches(measured: Measured, remedies: Remedies) -> Iterator[Finding]:
    """Report a model that does better by the statistics of each batch than by any that are fixed."""
    severity = _gap_severity(measured, "batch") if "batch" in measured.scores else None
    if severity is None or measured.measure == "difference of outputs":
        return
    values = {name: score.value for name, score in measured.scores.items()}
    told = ", ".join(
        f"{_shown(values[name], measured)} by {name}" for name in ("running", "population", "batch")
    )
    yield Finding(
        severity,
        "gap",
        None,
        f"{measured.measure} is {told} statistics: it takes those of each batch",
        "The model reads in a batch's statistics what its samples have in common, their class or domain, "
        "which a "
        "single sample does not show: calibrating does not help, training on other batches does.",
        f"{remedies.shuffle()}\n{remedies.renorm()}  # where the order must stay; then train again",
        {**values, "gain": _gain(measured.scores["running"], measured.scores["batch"])},
    )


def _gap_severity(measured: Measured, name: str) -> Severity | None:
    before, after = measured.scores["running"], measured.scores[name]
    if measured.measure == "difference of outputs":
        return "note" if not before.value < t.GAP_OUTPUT else None
    if before.correct is None or after.correct is None:
        return "likely" if not before.value <= (1 + t.GAP_LOSS) * after.value else None
    z = _standard_errors(before, after)
    gain = after.value - before.value
    if gain < t.GAP_LIKELY or z < t.GAP_Z:
        return None
    return "serious" if gain >= t.GAP_SERIOUS and z >= t.GAP_Z + 1 else "likely"


def _standard_errors(before: Score, after: Score) -> float:
    """Return McNemar's statistic: how many more predictions became right than wrong, in standard errors."""
    if before.correct is None or after.correct is None:
        return 0.0
    gained = int((after.correct & ~before.correct).sum())
    lost = int((before.correct & ~after.correct).sum())
    return (gained - lost) / math.sqrt(max(gained + lost, 1))


def _shown(value: float, measured: Measured) -> str:
    return f"{100 * value:.1f} %" if measured.measure == "accuracy" else f"{value:.3g}"


def _off(norm: NormState, layer: LayerGap, measured: Measured, remedies: Remedies) -> Iterator[Finding]:
    is_far = not (layer.mean_off < t.OFF_MEAN and layer.std_ratio < t.OFF_STD)
    costs = layer.cost is not None and measured.measure == "accuracy" and layer.cost >= t.GAP_LIKELY
    if costs and not is_far:
        costs = _standard_errors(measured.scores["running"], measured.alone[norm.name]) >= t.GAP_Z
    if norm.mean is None or norm.is_initial or not (is_far or costs):
        return
    told = (
        f"its running mean is {layer.mean_off:.2g} standard deviations off, its running standard deviation "
        "by a "
        f"factor of {layer.std_ratio:.3g}"
    )
    if layer.cost is not None:
        told += f"; replaced alone, they gain {_shown(layer.cost, measured)}"
    yield Finding(
        "likely" if costs else "note",
        "statistics-off",
        norm.name,
        told,
        "Evaluation normalizes this layer otherwise than training did.",
        remedies.calibrate(),
        {"mean_off": layer.mean_off, "std_ratio": layer.std_ratio, "gain": layer.cost or 0.0},
    )


def _magnitudes(norm: NormState, received: Received, remedies: Remedies) -> Iterator[Finding]:
    found = received.whole
    with np.errstate(divide="ignore", invalid="ignore"):
        std = np.sqrt(received.var())
        ratios = np.where(std > 0, np.abs(found.mean) / std, 0.0)
    ratio = float(np.nanmax(ratios, initial=0.0))
    # Of a channel that is constant but for rounding, the ratio says nothing.
    if t.OFFSET_NOTE < ratio < 1e7:
        digits = math.log10(ratio)
        yield Finding(
            "likely" if ratio > t.OFFSET_LIKELY and norm.is_stock else "note",
            "offset",
            norm.name,
            f"a channel has a mean of {ratio:.3g} standard deviations: {digits:.1f} of its 7 digits are lost",
            "Numbers that differ in their last digits only are normalized mostly by their rounding; stock "
            "layers "
            "lose more in their sums.",
            remedies.widen(),
            {"mean_over_std": ratio, "digits_lost": digits},
        )
    if received.peak > t.HALF / 2 and math.isfinite(received.peak):
        yield Finding(
            "likely" if received.dtype == "float16" else "note",
            "half-overflow",
            norm.name,
            f"it receives values up to {received.peak:.3g}, and float16 ends at 65504",
            "Under autocast in float16 such a value becomes inf, and one inf destroys the running "
            "statistics.",
            remedies.first_not_finite(),
            {"peak": received.peak},
        )


def _calls(norm: NormState, received: Received, remedies: Remedies) -> Iterator[Finding]:
    if len(received.calls) < 2:
        return
    std = np.sqrt(received.var() + norm.eps)
    means = np.stack([call.mean for call in received.calls])
    distance = float(np.sqrt(np.mean(((means.max(0) - means.min(0)) / std) ** 2)))
    if distance > t.CALLS_LIKELY:
        yield Finding(
            "likely",
            "repeated-calls",
            norm.name,
            f"its {len(received.calls)} calls receive means {distance:.2g} standard deviations apart",
            "One pair of running statistics fits neither call.",
            remedies.domains(len(received.calls)),
            {"calls": len(received.calls), "distance": distance},
        )


def _one_value(name: str, remedies: Remedies) -> Finding:
    return Finding(
        "likely",
        "one-value",
        name,
        "a batch of these has one value per channel",
        "In training this is an error, and its statistics would be the value itself and 0.",
        remedies.small_batch(),
        {"values": 1},
    )


def _batches(
    layers: tuple[LayerGap, ...], measured: Measured, norms: dict[str, NormState], remedies: Remedies
) -> Iterator[Finding]:
    noisy = [layer for layer in layers if layer.noise is not None and layer.noise > t.NOISE]
    spread = {name: of.noise(norms[name].eps) for name, of in measured.received.items() if name in norms}
    ratios = {name: of[1] for name, of in spread.items() if of is not None and math.isfinite(of[1])}
    worst = max(ratios, key=lambda name: ratios[name], default=None)
    is_ordered = False
    if worst is not None:
        batches = len(measured.received[worst].batches)
        sigmas = (ratios[worst] - 1) / math.sqrt(2 / (batches - 1))
        is_ordered = sigmas > t.ORDERED_SIGMAS
        if is_ordered:
            yield Finding(
                "likely",
                "ordered-batches",
                worst,
                f"the means of {batches} batches vary {ratios[worst]:.3g} times as much as those of "
                "batches drawn "
                "at random would",
                "Trained on in this order, each batch is normalized by the statistics of its own class or "
                "domain, "
                "and the running statistics are those of the last ones.",
                f"{remedies.shuffle()}\n{remedies.renorm()}  # where the order must stay",
                {"f": ratios[worst], "sigmas": sigmas, "batches": batches},
            )
    if noisy and not is_ordered:
        layer = max(noisy, key=lambda of: of.noise or 0.0)
        noise = layer.noise or 0.0
        yield Finding(
            "likely",
            "small-batches",
            layer.layer,
            f"in {len(noisy)} of {len(layers)} layers; most here: batch means vary by {noise:.2g} standard "
            f"deviations, with {layer.values:.0f} values per channel",
            "Training on batches of this size normalizes by noise. Synced over 8 processes: "
            f"{noise / 8**0.5:.2g}; "
            "Renorm and Running: by running statistics; accumulate: quieter running statistics only; Ghost: "
            "noisier; group normalization: no batch at all, but another function.",
            remedies.renorm(),
            {"noise": noise, "layers": len(noisy), "values": layer.values, "synced_over_8": noise / 8**0.5},
        )


def _whole(model: ModelState, measured: Measured, remedies: Remedies) -> Iterator[Finding]:
    if measured.broken is not None or measured.is_data_broken:
        yield Finding(
            "serious",
            "nonfinite-output",
            measured.broken or None,
            "the samples themselves have NaN or inf"
            if measured.is_data_broken
            else "it is the first layer whose output has NaN or inf, from inputs without",
            "Everything behind it is NaN or inf too, and one such batch destroys running statistics.",
            remedies.first_not_finite(),
        )
    if measured.mates is not None and measured.mates[0] > t.MIXING:
        change, layer = measured.mates
        adapts = any(norm.adapts for norm in model.norms if norm.name == layer)
        yield Finding(
            "note" if adapts else "likely" if model.training else "serious",
            "batch-mates",
            layer,
            f"a prediction changes by {change:.2g} of the spread of predictions when other samples of its "
            "batch do; "
            + (
                "the first layer that mixes them is this one"
                if layer
                else "no layer mixes them, but the forward"
            )
            + (", which adapts by its policy" if adapts else ""),
            "The model is in training mode."
            if model.training
            else "In evaluation no sample should see another.",
            remedies.evaluate(),
            {"change": change},
        )
    if measured.padding is not None and measured.padding[0] > t.MIXING:
        change, layer, is_given = measured.padding
        yield Finding(
            "likely",
            "padding",
            layer,
            f"a prediction changes by {change:.2g} of the spread of predictions with more padding"
            + ("" if is_given else " (zeros at the end of each sample, taken for padding)")
            + (
                "; the first layer that reads it is this one"
                if layer
                else "; no layer does it, but the forward"
            ),
            "Norms count padding in training, and turn its zeros into other values, which the next layer "
            "reads.",
            remedies.mask(),
            {"change": change},
        )
