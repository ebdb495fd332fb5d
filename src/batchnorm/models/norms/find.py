"""Finds the batch normalizations of a model, by qualified name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .kinds import BatchNormBase, Kind, is_layer, kind_of


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model within what compiles it or runs it on several processes."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def tracking_norms(model: nn.Module) -> dict[str, BatchNormBase]:
    """Return the layers of `model` that keep running statistics, by qualified name, each layer once.

    A model that is itself such a layer has none, and goes by its class.
    """
    return {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNormBase)
        and module.running_mean is not None
        and module.running_var is not None
    }


def split_frozen(
    norms: dict[str, BatchNormBase],
) -> tuple[dict[str, BatchNormBase], dict[str, BatchNormBase]]:
    """Return the layers whose statistics no batch moves, and the others."""
    frozen = [n for n, norm in norms.items() if is_layer(norm) and not norm.statistics.moves(True)]
    return {n: norms[n] for n in frozen}, {n: norm for n, norm in norms.items() if n not in frozen}


@dataclass(frozen=True)
class Found:
    """A batch normalization of a model, of any kind.

    Attributes:
        name: qualified name in the model; the first one where it has several.
        module: the layer.
        kind: its class.
        names: one for each place where it is registered.
    """

    name: str
    module: nn.Module
    kind: Kind
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.kind.name})" if self.name else self.kind.name


def all_names(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Return every module of `model` with one name for each place where it is registered.

    A module within a shared module is registered in one place, although it has two qualified names.
    """
    names: dict[nn.Module, tuple[str, ...]] = {model: ("",)}
    for prefix, parent in model.named_modules():
        for name, child in parent._modules.items():
            if child is not None:
                names[child] = (*names.get(child, ()), f"{prefix}.{name}" if prefix else name)
    return names


def find_norms(model: nn.Module) -> list[Found]:
    """Return every batch normalization of `model`, each layer once, in the order of registration."""
    names = all_names(model)
    return [
        Found(names[module][0], module, kind, names[module])
        for module in model.modules()
        if (kind := kind_of(module)) is not None
    ]
