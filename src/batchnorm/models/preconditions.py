"""Decorates the verbs: checks the model and the contexts that a verb is called in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from batchnorm.errors import OptionError
from batchnorm.torch.checks import check_module

from .norms.find import find_norms

_P = ParamSpec("_P")
_R = TypeVar("_R")


def verb(*, masked: str = "", pooled: str = "") -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator for a verb, a function whose first argument is a model.

    Within `torch.inference_mode` the verb runs outside of it, without gradients: tensors made in that mode
    cannot be trained later.

    Args:
        masked: why the verb is refused within `batchnorm.mask`; "" = it is allowed.
        pooled: why it is refused within `batchnorm.accumulate`; "" = it is allowed.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not args and "model" not in kwargs:
                return function(*args, **kwargs)  # Python says what is missing
            model = check_module(args[0] if args else kwargs["model"], function.__name__)
            _check_contexts(model, function.__name__, masked, pooled)
            with _outside_inference_mode(model):
                return function(*args, **kwargs)

        return checked

    return decorate


def _check_contexts(model: nn.Module, name: str, masked: str, pooled: str) -> None:
    for found in find_norms(model):
        scope = getattr(found.module, "_scope", None)
        if scope is not None and scope.samples is not None:
            raise OptionError(
                f"{name} within batchnorm.domain(model, ids), where several are in use: call it outside "
                "of the block, or within domain(model, k)",
                str(found),
            )
        if masked and scope is not None and scope.masked is not None:
            raise OptionError(
                f"{name} within batchnorm.mask: {masked}. Call it outside of the block", str(found)
            )
        if pooled and getattr(found.module, "_accumulator", None) is not None:
            raise OptionError(
                f"{name} within batchnorm.accumulate: {pooled}. Call it outside of the block", str(found)
            )


@contextlib.contextmanager
def _outside_inference_mode(model: nn.Module) -> Iterator[None]:
    """Leave inference mode within the block, unless the model was made in it and can change only there."""
    if not torch.is_inference_mode_enabled() or any(
        tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())
    ):
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
