"""Makes `torch.fx` record a layer, or a function, as one node, as it does with a stock layer.

torch recognizes its own layers by the name of their module, and does not call them while it traces. It does
call ours, with proxies in place of tensors; they return the node before any hook runs. The hooks run when the
node does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from torch import Tensor, nn
from torch.fx import Proxy

from batchnorm.errors import OptionError

from .quantization import REVERT_FIRST, quantizes

P = ParamSpec("P")
R = TypeVar("R")
ITSELF = (
    "torch.fx traces what is around a layer, and this is the layer itself: trace torch.nn.Sequential(layer)"
)


def is_symbolic(*values: object) -> bool:
    """Whether one of the arguments of a call is a proxy of `torch.fx`."""
    return any(isinstance(value, Proxy) for value in values)


def one_node(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that `torch.fx` records it as one node, as it does with torch's own."""

    @functools.wraps(function)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> R:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):
                return cast(R, value.tracer.create_proxy("call_function", recorded, args, kwargs))
        return function(*args, **kwargs)

    return recorded


class OneNode(nn.Module):
    """A layer that `torch.fx` records as one node."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and len(args) == 1 and type(args[0]) is Tensor:  # nearly all calls
            return nn.Module._call_impl(self, *args)  # type: ignore[no-untyped-call]
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):
                return _node(self, value.tracer, args, kwargs)
        return nn.Module._call_impl(self, *args, **kwargs)  # type: ignore[no-untyped-call]


def _node(layer: nn.Module, tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy:
    """Return the node that `torch.fx` records for a call of the layer, with the arguments of the call.

    Raises:
        OptionError: the tracer is one of torch.ao.quantization, and the layer a norm.
    """
    path = tracer.path_of_module(layer)
    if quantizes(tracer) and isinstance(layer, nn.modules.batchnorm._BatchNorm):
        raise OptionError(REVERT_FIRST, f"{path} ({type(layer).__name__})")
    node: Proxy = tracer.create_proxy("call_module", path, args, kwargs)
    return node
