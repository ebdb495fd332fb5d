"""Checks how the norms of a model go together: modes, frozen parts, neighbours, the optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from . import thresholds as t
from .findings import Finding
from .records import ModelState, NormState, Place
from .remedies import Remedies, remedies_of
from .state_checks import check_state


def check_model(model: ModelState) -> list[Finding]:
    """Return what is wrong with a model and its norms, without data."""
    remedies = remedies_of(model.framework, model.expressions)
    is_trained = any(norm.is_trained for norm in model.norms)
    found: list[Finding] = []
    for norm in model.norms:
        found += check_state(norm, remedies, is_trained=is_trained)
        if norm.unreadable:
            continue
        found += _frozen(model, norm, remedies)
        found += _mode(model, norm, remedies)
        if norm.name in model.places:
            found += _place(norm, model.places[norm.name], remedies)
    found += _whole(model, remedies)
    return found


def _frozen(model: ModelState, norm: NormState, remedies: Remedies) -> Iterator[Finding]:
    has_parameters = norm.weight is not None or norm.bias is not None
    if (
        norm.is_tracked
        and norm.moves
        and has_parameters
        and not norm.learns
        and (model.learns or norm.training)
    ):
        yield Finding(
            "serious" if norm.training else "likely",
            "frozen-parameters",
            norm.name,
            "its weight and bias do not learn, but its running statistics move"
            + (" now" if norm.training else " in training"),
            "requires_grad holds parameters only: every batch in training changes what a frozen layer "
            "computes.",
            remedies.freeze(norm.name),
            {"training": norm.training},
            "frozen, but its statistics move",
        )
    if norm.is_tracked and not norm.moves and model.learns and norm.learns and has_parameters:
        yield Finding(
            "note",
            "frozen-statistics",
            norm.name,
            "its running statistics stay, while its weight and bias learn",
            "As the weights before it change, its input is no longer what the statistics are of.",
            remedies.calibrate(),
            {},
            "frozen statistics, learning weight",
        )


def _mode(model: ModelState, norm: NormState, remedies: Remedies) -> Iterator[Finding]:
    if not norm.is_tracked:
        yield Finding(
            "likely",
            "untracked",
            norm.name,
            "it has no running statistics (track_running_stats=False)",
            "In evaluation a prediction depends on its batch, and CoreML refuses the layer.",
            remedies.track(norm.name),
            {},
            "untracked",
        )
    elif model.framework == "torch" and norm.moves and norm.training != model.training:
        yield Finding(
            "serious" if norm.training else "likely",
            "mixed-modes",
            norm.name,
            f"it is in {_mode_name(norm.training)}, and the model in {_mode_name(model.training)}",
            "It normalizes by each batch, and moves its statistics, while the model predicts."
            if norm.training
            else "The next model.train() thaws it.",
            remedies.evaluate() if norm.training else remedies.freeze(norm.name),
            {"layer_in_training": norm.training, "model_in_training": model.training},
            f"in {_mode_name(norm.training)}",
        )

    elif model.framework == "keras" and norm.training and norm.name not in model.fixed:
        yield Finding(
            "likely",
            "mixed-modes",
            norm.name,
            "the model's graph calls it with training=True",
            "Called as model(x), it normalizes by each batch; predict, export and training=False do not.",
            remedies.evaluate(),
            {"layer_in_training": True},
            "called with training=True",
        )


def _mode_name(training: bool) -> str:
    return "training mode" if training else "evaluation"


def _place(norm: NormState, place: Place, remedies: Remedies) -> Iterator[Finding]:
    if place.calls is not None and place.calls > 1:
        yield Finding(
            "note",
            "repeated-calls",
            norm.name,
            f"one forward calls it {place.calls} times",
            "Its running statistics average over all of its calls, which may receive different inputs.",
            remedies.domains(place.calls),
            {"calls": place.calls},
            f"{place.calls} calls",
        )
    for before in place.biased if place.dropout is None else ():
        yield Finding(
            "note",
            "bias-before",
            norm.name,
            f"the bias of {before} is subtracted again with the mean",
            "Such a bias learns nothing, and costs memory and a step of the optimizer.",
            remedies.drop_bias(before, norm.name),
            {"before": before},
            f"removes the bias of {before}",
        )
    if place.dropout is not None and place.rate != 0:
        rate = place.rate
        yield Finding(
            "likely" if rate is None or rate >= t.DROPOUT_LIKELY else "note",
            "dropout-before",
            norm.name,
            f"{place.dropout}" + ("" if rate is None else f" (p = {rate:g})") + " is right before it",
            "Dropout multiplies the variance by up to 1 / (1 − p) in training only, so that running "
            "statistics are not those of evaluation.",
            remedies.calibrate(),
            {} if rate is None else {"rate": rate, "std_in_evaluation": (1 - rate) ** 0.5},
            "dropout before it",
        )
    if place.values == 1:
        yield Finding(
            "note",
            "one-value",
            norm.name,
            "it receives one value per channel from each sample",
            "In training a batch of one sample, as the last of a data set may be, is an error.",
            remedies.small_batch(),
            {"values_per_sample": 1},
            "one value per sample",
        )


def _whole(model: ModelState, remedies: Remedies) -> Iterator[Finding]:
    kinds = {norm.is_synchronized for norm in model.norms if norm.moves and not norm.unreadable}
    if len(kinds) == 2:
        plain = [norm.name for norm in model.norms if norm.moves and not norm.is_synchronized]
        yield Finding(
            "likely",
            "mixed-synchronization",
            None,
            f"{len(plain)} of {len(model.norms)} norms are not synchronized ({plain[0]} is the first)",
            "On several processes the plain ones differ in their buffers, and are noisier than the others.",
            remedies.synchronize(),
            {"plain": len(plain), "norms": len(model.norms)},
        )
    worst = max(model.apart, key=lambda name: model.apart[name], default=None)
    if worst is not None and model.apart[worst] != 0:
        distance, count = model.apart[worst], sum(of != 0 for of in model.apart.values())
        yield Finding(
            "likely" if not distance < t.RANKS_LIKELY else "note",
            "different-ranks",
            worst,
            f"the running statistics of {count} norms differ between processes; most here: means, or logs of "
            f"deviations, are up to {distance:.2g} standard deviations apart",
            "Each process evaluates another model, and a checkpoint is whichever process wrote it.",
            remedies.calibrate() + "  # on every process: all get the statistics of all data",
            {"distance": distance, "norms": count},
        )
    for name in model.fixed:
        is_torch = model.framework == "torch"
        yield Finding(
            "serious",
            "training-graph",
            name or None,
            "batch normalization is fixed in training in this graph, whatever eval() is called"
            if is_torch
            else "the model calls it with training=True, at inference too",
            "A prediction depends on its batch, and whatever is exported from this fixes that.",
            remedies.end_training(name),
        )
    if model.training and model.framework == "torch" and model.norms:
        yield Finding(
            "note",
            "training-mode",
            None,
            "the model is in training mode",
            "Predictions depend on their batch, and torch.export, ONNX and CoreML would fix that, or "
            "refuse it.",
            remedies.evaluate(),
        )
    for group in model.decayed:
        yield Finding(
            "likely" if group.weight_decay > t.DECAY_LIKELY else "note",
            "weight-decay",
            None,
            f"weight decay of {group.weight_decay:g} is on weight or bias of {len(group.norms)} norms "
            f"({group.norms[0]} is the first)",
            "The scale of a normalized layer is in these numbers alone: decay pulls outputs towards 0, "
            "and does not regularize.",
            remedies.parameter_groups(),
            {"weight_decay": group.weight_decay, "norms": len(group.norms)},
        )
