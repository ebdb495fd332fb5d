"""Classifies batch normalizations by their class: of torch, of this library, of timm, or frozen ones."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal, TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.torch import layers, lazy
from batchnorm.torch.sync import SyncBatchNorm

from .timm import BatchNormAct2d

Family = Literal["stock", "ours", "timm", "synchronized", "frozen", "other"]

_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
    nn.LazyBatchNorm1d: lazy.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: lazy.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: lazy.LazyBatchNorm3d,
}
STOCK: dict[type[nn.Module], type[nn.Module]] = {ours: stock for stock, ours in _TWINS.items()}
# Classes of packages that need not be installed, by qualified name: where one is defined, and the public one.
TIMM = "timm.layers.norm_act.BatchNormAct2d"
_FROZEN_TIMM = "timm.layers.norm_act.FrozenBatchNormAct2d"
_FROZEN = ("torchvision.ops.misc.FrozenBatchNorm2d", "torchvision.ops.FrozenBatchNorm2d", _FROZEN_TIMM)
# The base of the layers of this library, and that of torch's and ours: private names where they are defined.
Layer = layers._Layer
LazyLayer = lazy._Lazy
BatchNormBase = _BatchNorm


@dataclass(frozen=True)
class Kind:
    """The class of a batch normalization.

    Attributes:
        name: qualified, as users write it: torch.nn.BatchNorm2d.
        family: who defines it: "stock" is torch, "other" a user.
        twin: the class of this library that `convert` gives it; None where it stays.
    """

    name: str
    family: Family
    twin: type[nn.Module] | None = None


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a batch normalization, None for any other module."""
    cls = origin(type(module))
    name = qualified(cls)
    if cls in _TWINS:
        return Kind(name, "stock", _TWINS[cls])
    if cls in STOCK or cls is BatchNormAct2d or cls is SyncBatchNorm:
        return Kind(name, "ours")
    if cls is nn.SyncBatchNorm:
        return Kind(name, "synchronized", SyncBatchNorm)
    if name == TIMM:
        return Kind(name, "timm", BatchNormAct2d)
    if _is_frozen(name):
        return Kind(name, "frozen", BatchNormAct2d if name == _FROZEN_TIMM else layers.BatchNorm2d)
    return Kind(name, "other") if issubclass(cls, BatchNormBase) else None


def _is_frozen(name: str) -> bool:
    # transformers has a copy for each detector: transformers.models.detr.modeling_detr.DetrFrozenBatchNorm2d.
    return name in _FROZEN or (name.startswith("transformers.models.") and name.endswith("FrozenBatchNorm2d"))


def is_ours(module: nn.Module) -> bool:
    """Whether a module is a layer of this library, or of a subclass of one."""
    return isinstance(module, Layer)


def is_layer(module: nn.Module) -> TypeGuard[Layer | LazyLayer]:
    """Whether a module is a layer of this library, or the lazy form of one."""
    return isinstance(module, (Layer, LazyLayer))


def is_synchronized(module: nn.Module) -> bool:
    """Whether a module is a SyncBatchNorm, torch's or ours, which does not tell the rank of its input."""
    return origin(type(module)) in (nn.SyncBatchNorm, SyncBatchNorm)


def qualified(cls: type) -> str:
    """Return `torch.nn.BatchNorm2d`, `batchnorm.BatchNorm2d`, else module and name of a class."""
    if cls in STOCK or cls is SyncBatchNorm:
        return f"batchnorm.{cls.__name__}"
    module = cls.__module__
    return f"{'torch.nn' if module.startswith('torch.nn.modules.') else module}.{cls.__qualname__}"


def origin(cls: type) -> type:
    """Return the class behind those that torch generates around it at run time.

    `torch.nn.utils.parametrize` makes a ParametrizedX(X), `fully_shard` an FSDPX(FSDPModule, X), `replicate`
    a DDPX(DDP, X), and sets the module's class to it.
    """
    while is_generated(cls):
        cls = cls.__bases__[-1]
    return cls


def is_generated(cls: type) -> bool:
    """Whether torch made this class at run time: it is named after its last base, with a prefix."""
    base = cls.__bases__[-1] if cls.__bases__ else object
    if not cls.__module__.startswith(("torch.nn.utils.parametrize", "torch.distributed.")):
        return False
    is_importable = getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls
    return not is_importable and cls.__name__ != base.__name__ and cls.__name__.endswith(base.__name__)


def rebased(cls: type, onto: type) -> type:
    """Return `onto` with the same generated classes around it as `cls` has around its origin."""
    if not is_generated(cls):
        return onto
    base = cls.__bases__[-1]
    inner = rebased(base, onto)
    prefix = cls.__name__.removesuffix(base.__name__)
    body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__", "__doc__")}
    return type(prefix + inner.__name__, (*cls.__bases__[:-1], inner), body)
