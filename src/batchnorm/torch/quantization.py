"""Makes torch.ao.quantization refuse our layers with an error that names the remedy, `revert`.

torch.ao.quantization looks layers up by their exact class. A norm that is not in its tables makes it stop
without a reason, or stays a float layer behind a quantized one.
"""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

from torch import nn

from batchnorm.errors import OptionError

REVERT_FIRST = "torch.ao.quantization takes torch's own layers only: call batchnorm.revert(model) first"


def quantizes(tracer: object) -> bool:
    """Whether a tracer of `torch.fx` belongs to torch.ao.quantization or to its numeric suite."""
    return any(kind.__module__.startswith("torch.ao.") for kind in type(tracer).__mro__)


def refuse_to_fuse(stock: type[nn.Module], ours: type[nn.Module]) -> None:
    """Make `fuse_modules` raise `REVERT_FIRST` for one of our classes where it would fuse the stock one."""
    try:
        methods = importlib.import_module("torch.ao.quantization.fuser_method_mappings")
    except ImportError:  # torch has announced to remove this module
        return
    table: dict[Any, Any] = getattr(methods, "_DEFAULT_OP_LIST_TO_FUSER_METHOD", {})
    table.update({_replaced(kinds, stock, ours): _refuse for kinds in list(table) if stock in kinds})


def _replaced(kinds: tuple[type, ...], stock: type, ours: type) -> tuple[type, ...]:
    """Return a pattern of layer classes with our class in place of the stock one."""
    return tuple(ours if kind is stock else kind for kind in kinds)


def _refuse(is_qat: bool, *modules: nn.Module) -> NoReturn:  # noqa: ARG001 -- the signature of torch's fusers
    """Raise OptionError for a sequence of layers that torch would fuse."""
    raise OptionError(REVERT_FIRST, " – ".join(type(module).__name__ for module in modules))
