"""Which layers of a model a context is for: those of this library; all others are refused by name."""

from __future__ import annotations

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.torch.checks import check_module
from batchnorm.torch.layers import _Layer

from .norms.find import find_norms
from .norms.kinds import is_layer


def layers_of(model: nn.Module, verb: str) -> list[_Layer]:
    """Return the batch normalizations of a model, each once.

    Raises:
        OptionError: there is none, or one is not of this library.
    """
    check_module(model, verb)
    norms = find_norms(model)
    if not norms:
        raise OptionError(f"{type(model).__name__} has no batch normalization to {verb}")
    for found in norms:
        if not is_layer(found.module):
            raise OptionError(
                f"{verb} is for layers of batchnorm, and this is none: batchnorm.convert(model) first",
                str(found),
            )
    return [found.module for found in norms]  # type: ignore[misc]  # a lazy one becomes such a layer


def shown(model: nn.Module, layer: nn.Module) -> str:
    """Return a layer's name in a model, and its class."""
    return next(str(found) for found in find_norms(model) if found.module is layer)
