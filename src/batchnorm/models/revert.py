"""Turns layers of this library back into stock layers, in place."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from typing import Any

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.running import Running
from batchnorm.statistics.synced import Synced
from batchnorm.torch.call import HALVES
from batchnorm.torch.layers import OPTIONS, OURS, beyond_stock
from batchnorm.torch.sync import SyncBatchNorm

from .convert import check_scripted
from .fusion.fused_activation import FusedActivation, restore
from .fusion.rewrite import FusedForward, authors_class, calls_of
from .norms.activations import module_for
from .norms.find import Found, all_names, find_norms
from .norms.kinds import STOCK, TIMM, is_layer, is_synchronized, origin, rebased
from .norms.timm import BatchNormAct2d, inner_activation
from .preconditions import verb
from .synchronized import plain_classes
from .verify import checked_change


@verb(
    masked="a stock layer heeds no mask",
    pooled="a stock layer moves its statistics in every forward",
)
def revert(model: nn.Module, *, example: Any = None) -> nn.Module:
    """Turn the layers of this library in `model` into stock layers, in place: the inverse of `convert`.

    Each layer stays the same module, with the same parameters, buffers, hooks and modes. What `fuse` did is
    undone: activation modules and forwards are the original ones. The activation of any other layer becomes
    a module behind it: `nn.Sequential(norm=..., activation=...)` takes its place, and the keys of its state
    gain `.norm`.

    `torch.nn.SyncBatchNorm`, ours, and layers with `statistics=Synced()` become plain layers with the same
    parameters and buffers, which undoes torch's `convert_sync_batchnorm` too. The rank of a SyncBatchNorm's
    input is read off the example, or off a layer next to it (a Conv2d before it).

    Args:
        model: with layers of this library, or `torch.nn.SyncBatchNorm`.
        example: as of `convert`.

    Returns:
        `model` itself.

    Raises:
        OptionError: (a ValueError) by name: a layer with other statistics than `Batch()` (`unfreeze` first),
            or options that no stock layer has (nonfinite, small_batch, domains, warm_start); one that is
            called with a residual, a user's subclass of one of our layers, a model that is itself a layer
            with an activation, or a SyncBatchNorm for whose input nothing tells the rank.
        AgreementError: (an ArithmeticError) the outputs on the example differ.

    Warns:
        UserWarning: the model cannot run in training on the example, so that only evaluation was compared.

    If it raises, or is interrupted, the model is as it was.

    Example:
        >>> model = batchnorm.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> type(batchnorm.revert(model)[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>

    Differs from torch: running statistics that `convert` widened become 16-bit again where the weight is.
    """
    check_scripted(model, "revert")
    found_norms = find_norms(model)
    norms = [found for found in found_norms if is_layer(found.module)]
    synchronized = [found for found in found_norms if is_synchronized(found.module)]
    _check(model, norms)
    plain = plain_classes(model, synchronized, example)
    with checked_change(model, example, "revert"):
        undo_fusion(model, norms)
        placed = [found for found in norms if _become_stock(found, plain.get(found.module))]
        _place_behind(model, placed)
        for norm in plain.keys() - {found.module for found in norms}:
            vars(norm).pop("process_group", None)
            norm.__class__ = rebased(type(norm), plain[norm])
    return model


def _check(model: nn.Module, norms: list[Found]) -> None:
    silenced = {module for module in model.modules() if isinstance(module, FusedActivation)}
    for found in norms:
        norm = found.module
        cls = origin(type(norm))
        if cls not in STOCK and cls not in (BatchNormAct2d, SyncBatchNorm):
            raise OptionError("a subclass of a layer of batchnorm: no stock layer computes that", str(found))
        policy = norm.statistics
        shared = policy.over if isinstance(policy, Synced) else policy  # on one rank the two are the same
        if shared != Batch():
            remedy = "unfreeze(model)" if shared == Running() else "convert(model, batchnorm.Batch())"
            raise OptionError(
                f"statistics={norm.statistics}, which no stock layer has: batchnorm.{remedy} first "
                "(or layer.statistics = batchnorm.Batch())",
                str(found),
            )
        _check_options(found)
        for act in vars(norm).get("_activation_at", ()):
            if act not in silenced:
                raise OptionError(
                    "its activation is outside of this part: revert the whole model", str(found)
                )
            silenced.discard(act)
        if not found.name and norm.activation is not None and cls is not BatchNormAct2d:
            raise OptionError(
                f"the model is one layer that applies {norm.activation}, and nothing can stand behind it: "
                "put it into an nn.Sequential",
                str(found),
            )
    if silenced:
        name = next(name for name, module in model.named_modules() if module in silenced)
        raise OptionError("the layer that applies it is outside of this part: revert the whole model", name)
    _check_residuals(model, {found.module: found for found in norms})


def _check_options(found: Found) -> None:
    """Refuse a layer with options that no stock layer has, other than statistics and activation."""
    for name, value in beyond_stock(found.module).items():
        if name not in ("statistics", "activation"):
            remedy = (
                "copy what you want to keep into a layer of one domain"
                if name == "domains"
                else f"layer.{name} = {OPTIONS[name]!r} first"
            )
            raise OptionError(f"{name}={value!r}, which no stock layer has: {remedy}", str(found))


def _check_residuals(model: nn.Module, norms: dict[nn.Module, Found]) -> None:
    """Refuse layers that a forward calls with a residual, as far as forwards are graphs."""
    for block, node, norm in calls_of(norms, model):
        if len(node.args) > 1 or "residual" in node.kwargs:
            raise OptionError(
                f"{type(block).__name__}.forward calls it with a residual, which no stock layer takes: "
                "add the residual behind the layer there",
                str(norms[norm]),
            )


def undo_fusion(model: nn.Module, norms: list[Found]) -> None:
    """Restore the activation modules and forwards that `fuse` changed, in place."""
    for found in norms:
        for act in vars(found.module).pop("_activation_at", ()):
            vars(found.module)["activation"] = None
            restore(act)
    for module in list(model.modules()):
        if isinstance(module, FusedForward):
            for path, _ in module._rewrite.spec.sites:
                vars(module.get_submodule(path))["activation"] = None
            del vars(module)["_rewrite"]
            module.__class__ = rebased_block(type(module), authors_class(module))


def rebased_block(cls: type, onto: type) -> Any:
    """Return the class of a block without `FusedForward`, within the same generated classes."""
    return onto if FusedForward in cls.__bases__ else rebased(cls, onto)


def _become_stock(found: Found, plain: type[nn.Module] | None = None) -> bool:
    """Set the class of a layer to stock; return whether it has an activation that a module must apply.

    Args:
        found: the layer.
        plain: the class that a SyncBatchNorm becomes.
    """
    norm = found.module
    cls = origin(type(norm))
    if cls is BatchNormAct2d:
        is_placed = norm.activation is not None and inner_activation(norm) is None
        module, _, name = TIMM.rpartition(".")
        stock = getattr(importlib.import_module(module), name)
    else:
        is_placed = norm.activation is not None
        stock = plain or STOCK[cls]
    norm.__class__ = rebased(type(norm), stock)
    for name in OURS:
        if name != "activation":
            vars(norm).pop(name, None)
    norm._buffers.pop("skipped", None)
    norm._non_persistent_buffers_set = norm._non_persistent_buffers_set - {"skipped"}
    weight = getattr(norm, "weight", None)
    for name in ("running_mean", "running_var"):
        buffer = norm._buffers.get(name)
        if buffer is not None and weight is not None and weight.dtype in HALVES:
            norm._buffers[name] = buffer.to(weight.dtype)
    if not is_placed:
        vars(norm).pop("activation", None)
    return is_placed


def _place_behind(model: nn.Module, placed: list[Found]) -> None:
    """Put a module for its activation behind each layer, wherever the layer is registered."""
    names = all_names(model)
    for found in placed:
        norm = found.module
        act = module_for(vars(norm).pop("activation")).train(norm.training)
        both = nn.Sequential(OrderedDict(norm=norm, activation=act)).train(norm.training)
        for place in names[norm]:
            parent, _, name = place.rpartition(".")
            model.get_submodule(parent)._modules[name] = both
