"""How the output of a norm is had again for the backward, instead of being kept: `lean` keeps recipes.

A recipe is what the norm keeps for its own gradient anyway (x, mean, rstd), and its parameters. Whoever keeps
the output gets a `Reading` of its recipe in place of the tensor. A recipe belongs to the graph of its norm:
it is held by what the norm keeps and by readings, and dies with them; it is found by its output's storage.

    y₃ = norm(x₃) + y₂,  y₂ = norm(x₂) + y₁,  y₁ = norm(x₁)        each of x₃, x₂, x₁ is kept; no y is

A residual, or an x, that is itself such an output makes a chain, recomputed link by link. It ends after
`SEGMENT` links: the next output is kept as it is. What a chain recomputes on its way is held until its
readers have taken it.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from batchnorm.kernels.interface import Engine, Statistics

from .call import Call

SEGMENT = 4  # links of a chain; the outputs of a whole segment can be in memory at once in the backward

_RECIPES: weakref.WeakValueDictionary[int, Recipe] = weakref.WeakValueDictionary()  # by the output's storage
_KEPT: weakref.WeakValueDictionary[int, Kept] = weakref.WeakValueDictionary()  # by the tensor's storage


class Kept:
    """A tensor that is kept as it is, with torch's own check that nobody has written to it since."""

    __slots__ = ("__weakref__", "recipe", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = tensor._version
        self.recipe: Recipe | None = None  # that this keeps alive

    def take(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: as torch's own, which checks no tensor that hooks keep: it was written to.
        """
        found = self.tensor
        if found._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: [{found.type()} {list(found.shape)}] is at version {found._version}; "
                f"expected version {self.version} instead. Hint: something wrote to this tensor between "
                "the forward and the backward that needs it: clone it before, or write after the backward."
            )
        return found


class Place(NamedTuple):
    """Which values of a storage a tensor shows."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        return cls(tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset()))

    def within(self, tensor: Tensor) -> Tensor:
        """Return those values of the storage of `tensor`."""
        return tensor.as_strided(self.size, self.stride, self.offset)


class Reading:
    """What stands for an output, or a view of it, where somebody keeps it for the backward."""

    __slots__ = ("__weakref__", "has_taken", "place", "recipe")

    def __init__(self, recipe: Recipe, tensor: Tensor) -> None:
        self.recipe = recipe
        self.place = Place.of(tensor)
        self.has_taken = False  # in the backward that is going on

    def take(self) -> Tensor:
        """Return the values, recomputed."""
        self.has_taken = True
        with torch.no_grad():
            return self.place.within(self.recipe.output())

    def is_sure(self) -> bool:
        return self.recipe.is_sure()


class Other:
    """A residual that its norm does not keep: it counts as kept if, by then, somebody else keeps it.

    That an output without activation can be recomputed must not keep its residual alive.
    """

    def __init__(self, residual: Tensor) -> None:
        self.storage = _reference(residual)  # its number is nobody else's meanwhile
        self.place, self.dtype, self.version = Place.of(residual), residual.dtype, residual._version
        self.kept: Kept | None = None

    def is_sure(self) -> bool:
        if self.kept is None:
            found = _KEPT.get(self.storage.cdata)
            if found is not None and (found.version, found.tensor.dtype) == (self.version, self.dtype):
                self.kept = found
        return self.kept is not None

    def take(self) -> Tensor:
        assert self.kept is not None, "taken before it was sure"
        return self.place.within(self.kept.take())


class Recipe:
    """What it takes to have the output `y` of a norm again, bit for bit: by the same kernels."""

    def __init__(
        self,
        y: Tensor,
        engine: Engine,
        call: Call,
        x: Kept | Reading,
        residual: Kept | Reading | Other | None,
        statistics: Statistics,
    ) -> None:
        self.storage = _reference(y)
        self.version, self.dtype, self.offset = y._version, y.dtype, y.storage_offset()
        self.device = y.device
        self.engine, self.statistics = engine, statistics
        self.activation, self.group_size = call.activation, call.group_size
        self.mask = None if call.mask is None else Kept(call.mask)
        # Copies: an optimizer's step is no reason to have other values, or none.
        parameters = (call.weight, call.bias)
        self.parameters = tuple(None if p is None else p.detach().clone() for p in parameters)
        self.x: Kept | Reading | None = x
        self.residual = residual
        before = (s.recipe.links for s in (x, residual) if isinstance(s, Reading))
        self.links: int = 1 + max(before, default=0)
        self._readings: list[weakref.ref[Reading]] = []
        self.lock = threading.RLock()
        self._found: Tensor | None = None  # recomputed, and waiting for readings
        self._stream: torch.Stream | None = None  # where it was

    def is_sure(self) -> bool:
        """Whether all of it will be there when the backward asks."""
        with self.lock:
            return all(s.is_sure() for s in (self.x, self.residual) if isinstance(s, Reading | Other))

    def read(self, tensor: Tensor) -> Reading:
        """Return a reading of the output, or of a view of it, for somebody who keeps it."""
        reading = Reading(self, tensor)
        self._readings.append(weakref.ref(reading))
        return reading

    def _is_awaited(self) -> bool:
        """Whether somebody who keeps the output has not taken it in this backward."""
        found = (reference() for reference in self._readings)
        return any(reading is not None and not reading.has_taken for reading in found)

    def output(self) -> Tensor:
        """Return the output: recomputed once for all who read it in this backward."""
        with self.lock:
            found, stream = self._found, _stream(self.device)
            if self.x is None:
                assert found is not None
                if stream is not None:
                    found.record_stream(stream)
                return found
            if found is None or stream != self._stream:
                found = self._recomputed()
            self._found, self._stream = (found, stream) if self._is_awaited() else (None, None)
            return found

    def _recomputed(self) -> Tensor:
        assert self.x is not None
        residual = None if self.residual is None else self.residual.take()
        mask = None if self.mask is None else self.mask.take()
        weight, bias = self.parameters
        call = Call(self.x.take(), weight, bias, residual, mask, self.activation, group_size=self.group_size)
        y = self.engine.normalize(call, self.statistics)
        assert y.storage_offset() == self.offset, "a fresh output begins where the first one did"
        return y

    def release(self) -> None:
        """End a backward: that of the norm is the last of those of its readers that take part in it.

        Who has not taken the output by now may do so when the norm keeps nothing any more. It is then kept as
        it is, and the recipe's own tensors are not.
        """
        with self.lock:
            if self.x is None:
                return
            if self._is_awaited():
                with torch.no_grad():
                    self._found = self.output()
                if self._stream is not None:
                    self._stream.synchronize()  # who reads it is not known yet
                self.x = self.residual = None
            else:
                self._found = None
                for reference in self._readings:
                    reading = reference()
                    if reading is not None:
                        reading.has_taken = False


def _stream(device: torch.device) -> torch.Stream | None:
    """Return the stream of a device; what one stream has recomputed is no other's to read."""
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


def _reference(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _key(tensor: Tensor) -> int | None:
    """Return the number of a tensor's storage, where it has a plain one."""
    is_plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    return tensor.untyped_storage()._cdata if is_plain and tensor.layout is torch.strided else None


def keep(tensor: Tensor) -> Kept:
    """Keep a tensor as it is."""
    kept = Kept(tensor)
    if not (tensor.is_leaf and tensor.requires_grad):  # parameters: nobody looks for them
        key = _key(tensor)
        if key is not None:
            _KEPT[key] = kept
    return kept


def find(tensor: Tensor) -> Recipe | None:
    """Return the recipe of a tensor: where it shows an output as the norm left it, in the norm's own graph.

    Outside that graph (`detach`) it may be kept for longer than what the recipe needs is there.
    """
    if tensor.is_leaf or (key := _key(tensor)) is None:
        return None
    found = _RECIPES.get(key)
    if found is None:
        return None
    same = (tensor._version, tensor.dtype) == (found.version, found.dtype)
    return found if same and not tensor.is_neg() and found.is_sure() else None


def record(
    y: Tensor, engine: Engine, call: Call, statistics: Statistics, keeps_residual: bool = True
) -> None:
    """Make the recipe of an output, where `lean` has kept what its norm keeps.

    Args:
        y: the output, with its graph.
        engine: what computed it.
        call: the call.
        statistics: by which it was normalized; the norm keeps them for its gradient.
        keeps_residual: whether behind an activation the norm keeps the residual, for its own gradient.
    """
    if not _KEPT:  # nobody is lean: a tenth of a microsecond
        return
    residual = call.residual
    key = _key(statistics[0])
    own = None if key is None else _KEPT.get(key)
    if (
        own is None
        or y.grad_fn is None
        or _key(y) is None
        or (residual is not None and _key(residual) is None)
    ):
        return
    keeps = keeps_residual and call.activation is not None
    recipe = Recipe(y, engine, call, _source(call.x), _residual(residual, keeps), statistics)
    if recipe.links > SEGMENT:
        return
    own.recipe = recipe
    y.grad_fn.recipe = weakref.ref(recipe)  # type: ignore[attr-defined]
    _RECIPES[recipe.storage.cdata] = recipe


def release(node: Any) -> None:
    """End a backward of the recipe's readers, as its norm's begins; `node` is the norm's."""
    found = getattr(node, "recipe", None)
    recipe = None if found is None else found()
    if recipe is not None:
        recipe.release()


def _source(tensor: Tensor) -> Kept | Reading:
    recipe = find(tensor)
    return Kept(tensor) if recipe is None else Reading(recipe, tensor)


def _residual(residual: Tensor | None, is_kept: bool) -> Kept | Reading | Other | None:
    if residual is None:
        return None
    found = _source(residual)
    if isinstance(found, Kept) and not is_kept:
        return Other(residual)
    return found
