"""Finds the layers of a model that a context is for, and gives them a record of their contexts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.torch.checks import check_module
from batchnorm.torch.contexts.checkpointing import Scope

from .norms.find import Found, find_norms
from .norms.kinds import Layer, is_layer


def norms_of(model: nn.Module, verb: str) -> list[Found]:
    """Return the batch normalizations of a model, of any kind, or raise OptionError if there is none."""
    norms = find_norms(model)
    if not norms:
        raise OptionError(f"{type(model).__name__} has no batch normalization to {verb}")
    return norms


def layers_of(model: nn.Module, verb: str) -> dict[str, Layer]:
    """Return the batch normalizations of a model, each once, by its name and class.

    Raises:
        OptionError: there is none, or one is not of this library.
    """
    check_module(model, verb)
    norms = norms_of(model, verb)
    for found in norms:
        if not is_layer(found.module):
            raise OptionError(
                f"{verb} is for layers of batchnorm, and this is none: batchnorm.convert(model) first",
                str(found),
            )
    return {str(found): found.module for found in norms}  # type: ignore[misc]  # a lazy one becomes such


@contextlib.contextmanager
def scoped(layer: Layer) -> Iterator[Scope]:
    """Give a layer a `Scope` within the block; after it, the layer has one only as long as it needs it."""
    scope = layer._scope
    if scope is None:
        scope = layer._scope = Scope()
    try:
        yield scope
    finally:
        if scope.is_over and vars(layer).get("_domain") is None and vars(layer).get("_scope") is scope:
            vars(layer).pop("_scope", None)
