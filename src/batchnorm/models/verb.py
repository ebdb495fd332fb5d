"""What every verb asks first: is it a model, and in contexts that the verb can heed."""

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
    """Decorate a verb, a function whose first argument is a model.

    It runs outside of `torch.inference_mode`, without gradients then: tensors that it makes could not be
    trained later.

    Args:
        masked: why the verb is refused within `batchnorm.mask`; "" = it is right there.
        pooled: why it is refused within `batchnorm.accumulate`.
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
    for found in find_norms(model) if masked or pooled else []:
        scope = getattr(found.module, "_scope", None)
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
    """Leave inference mode for a while, unless the model was made in it, and can only be changed there."""
    if not torch.is_inference_mode_enabled() or any(
        tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())
    ):
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
