"""Stock layers become ours, in place: the same modules, parameters and hooks, of another class."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from batchnorm.errors import OptionError

from .agreement import checked_change
from .hooks import is_forward_replaced
from .kinds import is_ours, rebased
from .norms import Found, find_norms
from .timm_norm import inner_activation

_LEFT = {
    "synchronised": "its statistics are those of all ranks, which no layer of batchnorm takes yet",
    "frozen": "it uses its running statistics in training too, which no layer of batchnorm does yet",
}


def convert(model: nn.Module, *, example: Any = None) -> nn.Module:
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
        `model` itself.

    Raises:
        OptionError: (a ValueError) a subclass of a stock layer, by its qualified name: what it computes is
            not known; a layer whose `forward` was replaced; a scripted model.
        AgreementError: (an ArithmeticError) the outputs on the example differ.

    Warns:
        UserWarning: names the layers that are left as they are, and says why: `torch.nn.SyncBatchNorm` and
            torchvision's `FrozenBatchNorm2d`; or the model cannot run in training on the example.

    If it raises, or is interrupted, the model is as it was.

    Differs from torch: running statistics of 16 bits become float32. `torch.nn.SyncBatchNorm.
    convert_sync_batchnorm` takes our layers for stock ones and would drop an activation: `revert` first.

    Source: https://github.com/pytorch/pytorch/issues/187298 (subclasses dropped silently).
    """
    norms = find_norms(model)
    check(model, norms, "convert")
    for family, reason in _LEFT.items():  # told before anything changes: a warning may be an error
        left = [found.name or found.kind.name for found in norms if found.kind.family == family]
        if left:
            warnings.warn(f"convert leaves {', '.join(left)} as before: {reason}", UserWarning, stacklevel=2)
    with checked_change(model, example, "convert"):
        for found in norms:
            if found.kind.twin is not None:
                become_ours(found)
    return model


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
