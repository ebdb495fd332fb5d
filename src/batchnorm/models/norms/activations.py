"""Which modules and functions of torch compute an activation that a layer can apply itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from batchnorm.models.graph.hooks import has_hooks, is_forward_replaced

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.ELU: "elu",
}
# Of packages that need not be installed, by qualified name.
_FOREIGN = {"transformers.activations.SiLUActivation": "silu"}
# The settings that a layer's activation has: a module with another one computes something else.
_SETTINGS: dict[str, dict[str, Any]] = {
    "leaky_relu": {"negative_slope": 0.01},
    "gelu": {"approximate": "none"},
    "elu": {"alpha": 1.0},
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
}
_CALLS: dict[Any, str] = {
    **{function: name for name, function in FUNCTIONS.items()},
    torch.relu: "relu",
    torch.relu_: "relu",
    F.sigmoid: "sigmoid",
    F.tanh: "tanh",
    torch.sigmoid_: "sigmoid",
    torch.tanh_: "tanh",
}
_METHODS = {name + end: name for name in ("relu", "sigmoid", "tanh") for end in ("", "_")}  # of torch.Tensor


def module_activation(module: nn.Module) -> str | None:
    """Return the layer's name of what a module computes; None where a layer cannot compute that."""
    cls = type(module)
    name = _MODULES.get(cls) or _FOREIGN.get(f"{cls.__module__}.{cls.__qualname__}")
    if name is None or has_hooks(module) or is_forward_replaced(module):
        return None
    wanted = _SETTINGS.get(name, {})
    return name if all(getattr(module, key) == value for key, value in wanted.items()) else None


def module_for(activation: str) -> nn.Module:
    """Return the module of torch that computes an activation."""
    return next(kind() for kind, name in _MODULES.items() if name == activation)


def call_activation(node: Node) -> str | None:
    """Return the layer's name of what a call of a function or method computes, without options; else None."""
    if len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return None
    if node.op == "call_function":
        return _CALLS.get(node.target)
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None
