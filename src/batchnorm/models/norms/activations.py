"""Recognizes the modules and functions of torch that compute an activation of our layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from batchnorm.models.graph.module_hooks import has_hooks, is_forward_replaced


class _InTorch(NamedTuple):
    """The forms in which torch offers an activation.

    Attributes:
        module: its class.
        functions: that compute it without options; the first one is for our use.
        settings: attributes of the module, with the values that a layer's activation has.
    """

    module: type[nn.Module]
    functions: tuple[Callable[[Tensor], Tensor], ...]
    settings: Mapping[str, str | float] = {}


_ACTIVATIONS = {
    "relu": _InTorch(nn.ReLU, (F.relu, torch.relu, torch.relu_)),
    "relu6": _InTorch(nn.ReLU6, (F.relu6,)),
    "leaky_relu": _InTorch(nn.LeakyReLU, (F.leaky_relu,), {"negative_slope": 0.01}),
    "silu": _InTorch(nn.SiLU, (F.silu,)),
    "gelu": _InTorch(nn.GELU, (F.gelu,), {"approximate": "none"}),
    "hardswish": _InTorch(nn.Hardswish, (F.hardswish,)),
    "sigmoid": _InTorch(nn.Sigmoid, (torch.sigmoid, torch.sigmoid_, F.sigmoid)),
    "tanh": _InTorch(nn.Tanh, (torch.tanh, torch.tanh_, F.tanh)),
    "elu": _InTorch(nn.ELU, (F.elu,), {"alpha": 1.0}),
}
FUNCTIONS = {name: known.functions[0] for name, known in _ACTIVATIONS.items()}
_CALLS: dict[object, str] = {f: name for name, known in _ACTIVATIONS.items() for f in known.functions}
_METHODS = {name + end: name for name in ("relu", "sigmoid", "tanh") for end in ("", "_")}  # of torch.Tensor
_MODULES = {known.module: name for name, known in _ACTIVATIONS.items()}
# Of packages that need not be installed, by qualified name.
_FOREIGN = {"transformers.activations.SiLUActivation": "silu"}


def module_activation(module: nn.Module) -> str | None:
    """Return the layer's name of what a module computes; None where a layer cannot compute that."""
    cls = type(module)
    name = _MODULES.get(cls) or _FOREIGN.get(f"{cls.__module__}.{cls.__qualname__}")
    if name is None or has_hooks(module) or is_forward_replaced(module):
        return None
    settings = _ACTIVATIONS[name].settings
    return name if all(getattr(module, key) == value for key, value in settings.items()) else None


def module_for(activation: str) -> nn.Module:
    """Return the module of torch that computes an activation."""
    return _ACTIVATIONS[activation].module()


def call_activation(node: Node) -> str | None:
    """Return the layer's name of what a call of a function or method computes, without options; else None."""
    if len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return None
    if node.op == "call_function":
        return _CALLS.get(node.target)
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None
