"""A forward that stops midway and goes on later: what it computed is read from a file, not computed again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.errors import FileError, OptionError
from batchnorm.models.graph.dispatch_observer import LEAVING, OURS

_WITHOUT = "leave spill out: passes over the data take every model"


class Budget:
    """How many bytes all stopped forwards hold in files, and how many they may."""

    def __init__(self, most: int | None) -> None:
        self.most, self.held, self.peak = most, 0, 0

    def take(self, count: int) -> None:
        """Count bytes that are about to be written, or (negative) that were deleted."""
        if self.most is not None and self.held + count > self.most:
            raise OptionError(
                f"spill={self.most} bytes are too few: stopped forwards hold {self.held + count} and more; "
                "allow more, or leave spill out"
            )
        self.held += count
        self.peak = max(self.peak, self.held)


@dataclass(frozen=True)
class _Value:
    """A tensor, by its memory and how it lies in it."""

    slot: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Argument:
    """The argument at this place, which an operator wrote into and returned."""

    place: int


@dataclass(frozen=True)
class _Step:
    """What an operator returned; None where it is to be run again (a view of a parameter)."""

    name: str
    leaves: tuple[Any, ...] | None
    spec: pytree.TreeSpec


class Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs one forward up to where it stops, again and again, each operator once.

    The Python code of the forward runs from its start each time. Operators that ran before return what they
    returned: memory that was alive when the forward stopped comes from the file, all other is not read any
    more and is any memory of that size.

    Args:
        path: of the file.
        budget: shared by all forwards.
    """

    def __init__(self, path: Path, budget: Budget) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.path, self.budget = path, budget
        self._leaving = _Leaving(self)
        self._steps: list[_Step] = []
        self._refs: list[StorageWeakRef] = []  # by slot
        self._sizes: list[int] = []  # bytes, by slot
        self._devices: list[torch.device] = []
        self._slots: dict[StorageWeakRef, int] = {}
        self._saved: dict[int, int] = {}  # slot -> where in the file
        self._held = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Follow a forward from its start within the block."""
        self._place = 0
        self._loaded: dict[int, torch.UntypedStorage] = {}
        self.is_paused = False
        try:
            with self, self._leaving:
                yield
        finally:
            self._loaded, self._slots = {}, {}

    def adopt(self, tensor: Tensor) -> _Value:
        """Return how to get a tensor again that no operator makes: an input."""
        return self._value(tensor)

    def restore(self, value: _Value) -> Tensor:
        """Return a tensor in memory as it was when the forward stopped; to be called while paused."""
        return self._tensor(value)

    def stop(self) -> None:
        """Write all memory that is alive to the file; to be called while paused.

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
            with self.path.open("r+b") as file:  # over what was read before: its memory is there
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
        """Return what an operator returns: looked up if it has run before this forward stopped."""
        self._place += 1
        self.is_paused = True  # what happens in here is no step of its own
        try:
            if self._place <= len(self._steps):
                return self._again(self._steps[self._place - 1], name, compute, pytree.tree_leaves(arguments))
            self._loaded = {}  # what is alive from here on is what the forward itself holds
            result = compute()
            self._steps.append(self._note(name, result, pytree.tree_leaves(arguments)))
            return result
        finally:
            self.is_paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_paused:
            return func(*args, **kwargs)
        return self.step(str(func), lambda: func(*args, **kwargs), (args, kwargs))

    def _again(self, step: _Step, name: str, compute: Callable[[], Any], given: list[Any]) -> Any:
        if step.name != name:
            raise OptionError(
                f"spill: a forward took another way the second time, {name} for {step.name}: {_WITHOUT}"
            )
        if step.leaves is None:
            return compute()
        return pytree.tree_unflatten([self._leaf(leaf, given) for leaf in step.leaves], step.spec)

    def _note(self, name: str, result: Any, given: list[Any]) -> _Step:
        leaves, spec = pytree.tree_flatten(result)
        places = {id(leaf): place for place, leaf in enumerate(given) if isinstance(leaf, Tensor)}
        theirs = {_key(leaf) for leaf in given if isinstance(leaf, Tensor)} - self._slots.keys()
        noted: list[Any] = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                noted.append(leaf)
            elif id(leaf) in places:
                noted.append(_Argument(places[id(leaf)]))
            elif _key(leaf) in theirs:
                return _Step(name, None, spec)
            else:
                noted.append(self._value(leaf))
        return _Step(name, tuple(noted), spec)

    def _value(self, tensor: Tensor) -> _Value:
        if tensor.is_conj() or tensor.is_neg():
            raise OptionError(f"spill: the forward has complex or negated views: {_WITHOUT}")
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

    def _leaf(self, leaf: Any, given: list[Any]) -> Any:
        if isinstance(leaf, _Argument):
            return given[leaf.place]
        return self._tensor(leaf) if isinstance(leaf, _Value) else leaf

    def _tensor(self, value: _Value) -> Tensor:
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


class _Leaving(TorchFunctionMode):
    """Our own function, whose kernels are no operators, is one step; what leaves torch is refused."""

    def __init__(self, replay: Replay) -> None:
        super().__init__()
        self.replay = replay

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, replay = kwargs or {}, self.replay
        if replay.is_paused or (func not in OURS and func not in LEAVING):
            return func(*args, **kwargs)
        if func in LEAVING:
            raise OptionError(f"spill: the forward leaves torch by {func.__name__}: {_WITHOUT}")

        return replay.step("batchnorm", lambda: func(*args, **kwargs), (args, kwargs))


def _key(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
