"""Stock layers become ours, in place: the same modules, parameters and hooks, of another class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from batchnorm.errors import OptionError

from .agreement import assert_agree, observe
from .hooks import is_forward_replaced
from .kinds import is_ours, rebased
from .norms import Found, find_norms
from .report import ModelReport, NormRow, describe
from .rollback import untouched_on_error
from .timm_norm import inner_activation

_LEFT = {
    "synchronised": "its statistics are those of all ranks, which no layer of batchnorm takes yet",
    "frozen": "it uses its running statistics in training too, which no layer of batchnorm does yet",
    "transformers": "it uses its running statistics in training too, which no layer of batchnorm does yet",
}


def convert(model: nn.Module, example: Any = None) -> ModelReport:
    """Turn the batch normalizations of `model` into layers of this library, in place.

    A layer stays the module that it is, and becomes of another class: parameters, buffers, hooks, device,
    dtype, modes and requires_grad are the same objects and values, so optimizers, shared modules, DDP and
    parametrizations go on working. It computes what it did, more accurately.

    Args:
        model: with `torch.nn.BatchNorm1d`, 2d, 3d, their lazy forms, or `timm.layers.BatchNormAct2d` (its
            activation moves into the layer if it is one that the layer has); or such a layer itself.
        example: what the model takes: a tensor, a tuple of arguments or a dict of keyword arguments. If
            given, the model's outputs on it are compared before and after, in evaluation and in training.

    Returns:
        A report with one row per norm. `torch.nn.SyncBatchNorm` and torchvision's `FrozenBatchNorm2d` are
        left as they are, and their rows say why.

    Raises:
        OptionError: (a ValueError) a subclass of a stock layer, by its qualified name: what it computes is
            not known; a layer whose `forward` was replaced; a scripted model.
        AgreementError: (an ArithmeticError) the outputs on the example differ.

    If it raises, or is interrupted, the model is as it was.

    Differs from torch: running statistics of 16 bits become float32. `torch.nn.SyncBatchNorm.
    convert_sync_batchnorm` takes our layers for stock ones and would drop an activation: `revert` first.

    Source: https://github.com/pytorch/pytorch/issues/187298 (subclasses dropped silently).
    """
    norms = find_norms(model)
    check(model, norms, "convert")
    before = None if example is None else observe(model, example)
    with untouched_on_error(model):
        rows = tuple(_converted(found) for found in norms)
        if before is not None:
            assert_agree(before, model, example, "convert")
    count = sum(bool(row.done) for row in rows)
    title = f"{type(model).__name__}: {count} of {len(rows)} batch normalizations converted"
    return ModelReport(title, rows, notes(before), "convert")


def notes(before: Any) -> tuple[str, ...]:
    """Return what a comparison on an example could not cover."""
    return (before.unchecked,) if before is not None and before.unchecked else ()


def check_scripted(model: nn.Module, verb: str) -> None:
    """Raise OptionError for a scripted model: its code is fixed."""
    if isinstance(model, torch.jit.ScriptModule):
        raise OptionError(f"{verb} cannot change a scripted model: call it before torch.jit.script")


def check(model: nn.Module, norms: list[Found], verb: str) -> None:
    """Raise OptionError for a scripted model, an unknown subclass, or a layer with a forward of its own."""
    check_scripted(model, verb)
    for found in norms:
        if found.kind.family == "other" and not is_ours(found.module):
            raise OptionError(
                f"a subclass whose forward may compute something else, so {verb} leaves the model as it is: "
                "make it a layer of torch.nn (or of batchnorm) and what it adds a module of its own",
                str(found),
            )
        if found.kind.family in ("stock", "timm", "ours") and is_forward_replaced(found.module):
            raise OptionError(
                f"its forward was replaced on the instance, so {verb} leaves the model as it is: "
                "take that back first (accelerate: remove_hook_from_module)",
                str(found),
            )


def _converted(found: Found) -> NormRow:
    kind = found.kind
    if is_ours(found.module) or kind.family == "ours":
        return describe(found, reason="it is one of batchnorm's already")
    if kind.family in _LEFT:
        return describe(found, reason=_LEFT[kind.family])
    become_ours(found)
    return describe(found, done=f"converted from {kind.name}")


def become_ours(found: Found) -> None:
    """Set the class of a norm to our twin of it; the module stays the same object."""
    norm, kind = found.module, found.kind
    assert kind.twin is not None
    activation = inner_activation(norm) if kind.family == "timm" else None
    norm.__class__ = rebased(type(norm), kind.twin)
    vars(norm)["activation"] = activation
    if norm.track_running_stats and norm._buffers.get("num_batches_tracked") is None:
        mean = norm._buffers.get("running_mean")  # a layer of torch < 0.4.1 has no counter
        if mean is not None:
            norm._buffers["num_batches_tracked"] = torch.tensor(0, dtype=torch.long, device=mean.device)
    if is_ours(norm):
        norm._widen_statistics()  # type: ignore[operator]
