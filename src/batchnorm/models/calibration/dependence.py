"""Which tensors depend on a value that is not final yet: followed through every operator of a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.models.graph.dispatch_observer import LEAVING, OURS, tensors_in, written

# Operators that let data decide what Python does next: it reads a number, or the size of the result.
_DECIDING = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


class Dependence(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Marks what is computed from marked tensors, as long as it is active.

    By storage, so that views and writes in place are seen. Where a marked value decides what Python does
    next (`if x.max() > 1`), or leaves torch (`x.numpy()`), all that is computed from then on is marked: too
    much rather than too little.

    Attributes:
        is_paused: what is computed meanwhile is not followed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._leaving = _Leaving(self)
        self.clear()

    def clear(self) -> None:
        """Forget all marks, before the next forward."""
        self._marked: set[StorageWeakRef] = set()  # weak, yet no other storage gets the same address
        self._everything = False
        self.is_paused = False

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Follow what is computed within the block."""
        with self, self._leaving:
            yield

    def mark(self, values: Any) -> None:
        """Mark every tensor in `values`, of any nesting."""
        for tensor in tensors_in(values):
            storage = _storage(tensor)
            if storage is None:
                self._everything = True
            else:
                self._marked.add(storage)

    def mark_everything(self) -> None:
        """Mark all that is computed from now on."""
        self._everything = True

    def is_marked(self, values: Any) -> bool:
        """Whether any tensor in `values` is marked."""
        if self._everything:
            return True
        return bool(self._marked) and any(
            (storage := _storage(tensor)) is None or storage in self._marked for tensor in tensors_in(values)
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        marked = not self.is_paused and self.is_marked((args, kwargs))
        result = func(*args, **kwargs)
        if marked:
            self.mark(result)
            self.mark(written(func, args, kwargs))
            if not _DECIDING.isdisjoint(getattr(func, "tags", ())):
                self._everything = True
        return result


class _Leaving(TorchFunctionMode):
    """Sees what operators do not show: ways out of torch, and our own function with its own kernels."""

    def __init__(self, dependence: Dependence) -> None:
        super().__init__()
        self.dependence = dependence

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, dependence = kwargs or {}, self.dependence
        is_seen = (func in OURS or func in LEAVING) and not dependence.is_paused
        if not (is_seen and dependence.is_marked((args, kwargs))):
            return func(*args, **kwargs)
        dependence.is_paused = True  # our kernels take addresses too
        try:
            result = func(*args, **kwargs)
        finally:
            dependence.is_paused = False
        if func in OURS:
            dependence.mark(result)
        else:
            dependence.mark_everything()
        return result


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    """Return what identifies the memory of a tensor, None where it has none of its own."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError):
        return None
