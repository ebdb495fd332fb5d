"""Finds the tensors that depend on a value that is not final yet, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from batchnorm.models.graph.dispatch_observer import OURS, DispatchObserver, tensors_in, written

# Operators that let data decide what Python does next: it reads a number, or the size of the result.
_DECIDING = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


class Dependence(DispatchObserver):  # type: ignore[no-untyped-call]
    """Marks what is computed from marked tensors, while it observes.

    It marks storages, so that views and writes in place are covered. Where a marked value decides what Python
    does next (`if x.max() > 1`), or leaves torch (`x.numpy()`), everything that is computed afterwards is
    marked: rather too much than too little.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Remove all marks, before the next forward."""
        self._marked: set[StorageWeakRef] = set()  # weak, yet no other storage gets the same address
        self._everything = False
        self.is_paused = False

    def mark(self, values: object) -> None:
        """Mark every tensor in `values`, of any nesting."""
        for tensor in tensors_in(values):
            storage = _storage(tensor)
            if storage is None:
                self._everything = True
            else:
                self._marked.add(storage)

    def is_marked(self, values: object) -> bool:
        """Whether any tensor in `values` is marked."""
        if self._everything:
            return True
        return bool(self._marked) and any(
            (storage := _storage(tensor)) is None or storage in self._marked for tensor in tensors_in(values)
        )

    def on_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, and mark its results if an argument is marked."""
        marked = self.is_marked((args, kwargs))
        result = func(*args, **kwargs)
        if marked:
            self.mark((result, written(func, args, kwargs)))
            self._everything |= not _DECIDING.isdisjoint(getattr(func, "tags", ()))
        return result

    def on_function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of ours, or a way out of torch, and mark what follows if an argument is marked."""
        if not self.is_marked((args, kwargs)):
            return func(*args, **kwargs)
        self.is_paused = True  # our kernels take addresses too
        try:
            result = func(*args, **kwargs)
        finally:
            self.is_paused = False
        if func in OURS:
            self.mark(result)
        else:
            self._everything = True
        return result


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    """Return what identifies the memory of a tensor, None where it has none of its own."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError):
        return None
