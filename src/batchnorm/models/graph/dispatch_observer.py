"""Observes a forward operator by operator, and the calls on tensors that no operator shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.torch import dispatch, functional

# Functions whose kernels are no operators that an observer would see.
OURS = frozenset({functional.batch_norm, dispatch.batch_norm})

# Ways out of torch: they read values, and no operator shows it.
LEAVING = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr})


class DispatchObserver(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Receives every operator of a forward, below autograd, and every call of `OURS` and `LEAVING`.

    Attributes:
        is_paused: what runs meanwhile is not received.
    """

    is_paused = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Receive what runs within the block."""
        with self, _Functions(self):
            yield

    def on_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator and return its result."""
        raise NotImplementedError

    def on_function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one of `OURS` or `LEAVING` and return its result; the operators within come one by one."""
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        return self.on_operator(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __init__(self, observer: DispatchObserver) -> None:
        super().__init__()
        self._observer = observer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._observer.is_paused or (func not in OURS and func not in LEAVING):
            return func(*args, **(kwargs or {}))
        return self._observer.on_function(func, args, kwargs or {})


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in arguments or results, of any nesting."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operator writes to."""
    found = []
    schema = getattr(func, "_schema", None)  # operators of higher order have none, and write into nothing
    for place, argument in enumerate(schema.arguments if schema else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            found += tensors_in(given)
    return found
