"""Stops a forward midway and resumes it later from a file, without computing anything twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from batchnorm.errors import FileError, OptionError
from batchnorm.models.graph.dispatch_observer import LEAVING, DispatchObserver

# The remedy in errors about forwards that cannot be stopped.
WITHOUT = "leave spill out: passes over the data take that"


class Budget:
    """Limits the bytes that all stopped forwards hold in files.

    Args:
        most: number of bytes; None = no limit.
    """

    def __init__(self, most: int | None) -> None:
        self.most, self.held, self.peak = most, 0, 0

    def take(self, count: int) -> None:
        """Count bytes that will be written, or (negative) were deleted; OptionError if they are too many."""
        if self.most is not None and self.held + count > self.most:
            raise OptionError(
                f"spill={self.most} bytes are too few: stopped forwards hold {self.held + count} and more; "
                "allow more, or leave spill out"
            )
        self.held += count
        self.peak = max(self.peak, self.held)


@dataclass(frozen=True)
class _Value:
    """A tensor: its memory, by number, and its layout in it."""

    slot: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Argument:
    """The argument at one place, which an operator wrote into and returned."""

    place: int


@dataclass(frozen=True)
class _Step:
    """The result of an operator; None where the operator has to run again (a view of a parameter)."""

    name: str
    leaves: tuple[Any, ...] | None
    spec: pytree.TreeSpec


class Replay(DispatchObserver):  # type: ignore[no-untyped-call]
    """Runs one forward from stop to stop, with each operator computed once.

    The Python code of the forward runs from its start each time. Operators that have run return what they
    returned: memory that was alive when the forward stopped is read from the file. Other memory is not read
    any more, and is replaced by uninitialized memory of the same size.

    Args:
        path: of the file.
        budget: shared by all forwards.
    """

    def __init__(self, path: Path, budget: Budget) -> None:
        super().__init__()
        self.path, self.budget = path, budget
        self._steps: list[_Step] = []
        self._refs: list[StorageWeakRef] = []  # by slot
        self._sizes: list[int] = []  # bytes, by slot
        self._devices: list[torch.device] = []
        self._slots: dict[StorageWeakRef, int] = {}
        self._saved: dict[int, int] = {}  # slot -> where in the file
        self._held = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Record, or replay, a forward from its start within the block."""
        self._place = 0
        self._loaded: dict[int, torch.UntypedStorage] = {}
        self.is_paused = False
        try:
            with self.following():
                yield
        finally:
            self._loaded, self._slots = {}, {}

    def stop(self) -> None:
        """Write all memory that is alive to the file; call it while paused.

        Raises:
            FileError: it cannot be written.
            OptionError: the budget is used up.
        """
        alive = [slot for slot, ref in enumerate(self._refs) if not ref.expired()]  # type: ignore[no-untyped-call]
        self._saved = {}
        self.budget.take(-self._held)
        self._held = 0
        size = sum(self._sizes[slot] for slot in alive)
        self.budget.take(size)
        self._held = size
        place = 0
        try:
            self.path.touch()
            with self.path.open("r+b") as file:  # what was in the file has been read
                for slot in alive:
                    storage = torch.UntypedStorage._new_with_weak_ptr(self._refs[slot].cdata)
                    flat = torch.empty(0, dtype=torch.uint8, device=self._devices[slot]).set_(storage)
                    file.write(flat.cpu().numpy().data)
                    self._saved[slot] = place
                    place += self._sizes[slot]
                file.truncate(place)
        except OSError as error:
            raise FileError(
                f"spill: {self.path} cannot be written ({error.strerror or error}): name a folder with more "
                "space, or leave spill out; the model is unchanged"
            ) from error

    def finish(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
        self.budget.take(-self._held)
        self._steps, self._saved = [], {}

    def step(self, name: str, compute: Callable[[], Any], arguments: Any) -> Any:
        """Return what an operator returns; from the record if it ran before the forward stopped."""
        self._place += 1
        self.is_paused = True  # operators within this one are no steps of their own
        try:
            if self._place <= len(self._steps):
                return self._again(self._steps[self._place - 1], name, compute, pytree.tree_leaves(arguments))
            self._loaded = {}  # from here on only the forward itself keeps memory alive
            result = compute()
            self._steps.append(self._note(name, result, pytree.tree_leaves(arguments)))
            return result
        finally:
            self.is_paused = False

    def on_function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run our own function, whose kernels are no operators, as one step; refuse ways out of torch."""
        if func in LEAVING:
            raise OptionError(f"spill: the forward leaves torch by {func.__name__}: {WITHOUT}")
        return self.step("batchnorm", lambda: func(*args, **kwargs), (args, kwargs))

    def on_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator as one step."""
        return self.step(str(func), lambda: func(*args, **kwargs), (args, kwargs))

    def _again(self, step: _Step, name: str, compute: Callable[[], Any], given: list[Any]) -> Any:
        if step.name != name:
            raise OptionError(
                f"spill: a forward took another way the second time, {name} for {step.name}: {WITHOUT}"
            )
        if step.leaves is None:
            return compute()
        return pytree.tree_unflatten([self.restored(leaf, given) for leaf in step.leaves], step.spec)

    def _note(self, name: str, result: Any, given: list[Any]) -> _Step:
        leaves, spec = pytree.tree_flatten(result)
        places = {id(leaf): place for place, leaf in enumerate(given) if isinstance(leaf, Tensor)}
        foreign = {_key(leaf) for leaf in given if isinstance(leaf, Tensor)} - self._slots.keys()
        noted: list[Any] = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                noted.append(leaf)
            elif id(leaf) in places:
                noted.append(_Argument(places[id(leaf)]))
            elif _key(leaf) in foreign:
                return _Step(name, None, spec)
            else:
                noted.append(self.saved(leaf))
        return _Step(name, tuple(noted), spec)

    def saved(self, tensor: Tensor) -> _Value:
        """Return a tensor as a reference to memory that `stop` writes to the file."""
        if tensor.is_conj() or tensor.is_neg():
            raise OptionError(f"spill: the forward has complex or negated views: {WITHOUT}")
        key = _key(tensor)
        if key not in self._slots:
            self._slots[key] = len(self._refs)
            self._refs.append(key)
            self._sizes.append(tensor.untyped_storage().nbytes())
            self._devices.append(tensor.device)
        slot = self._slots[key]
        self._sizes[slot] = tensor.untyped_storage().nbytes()
        offset = int(tensor.storage_offset())
        return _Value(slot, tensor.dtype, tensor.size(), tensor.stride(), offset)

    def restored(self, value: Any, given: Sequence[Any]) -> Any:
        """Return a value as it was when the forward stopped; call it while paused.

        Args:
            value: what `saved` returned; an argument by its place; any other value is returned as it is.
            given: the arguments of the operator.
        """
        if isinstance(value, _Argument):
            return given[value.place]
        if not isinstance(value, _Value):
            return value
        storage = self._loaded.get(value.slot)
        if storage is None:
            storage = self._storage(value.slot)
            key = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._refs[value.slot] = key
            self._slots[key] = value.slot
            if value.slot in self._saved:
                self._loaded[value.slot] = storage
        empty = torch.empty(0, dtype=value.dtype, device=self._devices[value.slot])
        return empty.set_(storage, value.offset, value.size, value.stride)

    def _storage(self, slot: int) -> torch.UntypedStorage:
        size, device = self._sizes[slot], self._devices[slot]
        if slot not in self._saved:
            return torch.UntypedStorage(size, device=device)  # type: ignore[no-untyped-call]
        found = np.fromfile(self.path, np.uint8, size, offset=self._saved[slot])
        return torch.from_numpy(found).to(device).untyped_storage()


def _key(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
