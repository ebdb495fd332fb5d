"""What torch.ao.quantization is told of our layers: that it takes torch's own, which `revert` makes of them.

Its flows look layers up by their exact class, in tables. Where they miss a norm they stop without saying
why, or leave it in float behind a quantized layer.
"""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

from torch import nn

from batchnorm.errors import OptionError

REVERT_FIRST = "torch.ao.quantization takes torch's own layers only: call batchnorm.revert(model) first"


def quantizes(tracer: object) -> bool:
    """Whether a tracer of `torch.fx` is one of torch.ao.quantization, or of what compares its models."""
    return any(kind.__module__.startswith("torch.ao.") for kind in type(tracer).__mro__)


def refuse_to_fuse(stock: type[nn.Module], ours: type[nn.Module]) -> None:
    """Have `fuse_modules` say `REVERT_FIRST` of one of our classes, where it would fuse the stock one."""
    try:
        methods = importlib.import_module("torch.ao.quantization.fuser_method_mappings")
    except ImportError:  # torch says that it will go
        return
    table: dict[Any, Any] = getattr(methods, "_DEFAULT_OP_LIST_TO_FUSER_METHOD", {})
    table.update({_replaced(kinds, stock, ours): _refuse for kinds in list(table) if stock in kinds})


def _replaced(kinds: tuple[type, ...], stock: type, ours: type) -> tuple[type, ...]:
    return tuple(ours if kind is stock else kind for kind in kinds)


def _refuse(is_qat: bool, *modules: nn.Module) -> NoReturn:  # noqa: ARG001 -- as every fuser of torch
    raise OptionError(REVERT_FIRST, " – ".join(type(module).__name__ for module in modules))
