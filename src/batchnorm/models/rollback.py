"""A verb that raises has left the model untouched: classes, attributes and registrations are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def untouched_on_error(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` back as it was if the block raises, whatever it raises.

    Covers what a verb changes: a module's class, its attributes, what is registered in it, and which of its
    parameters learn. The values of tensors are not copied; a verb writes none of them in place.
    """
    learning = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    before = [(module, type(module), dict(vars(module)), _contents(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, cls, attributes, contents in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            for container, items in contents:  # in place: handles of hooks refer to these very dicts
                container.clear()
                container.update(items)
        for parameter, requires_grad, grad in learning:
            parameter.requires_grad = requires_grad  # the method is not for lazy layers
            parameter.grad = grad
        raise


def _contents(module: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    return [(value, dict(value)) for value in vars(module).values() if isinstance(value, dict)]
