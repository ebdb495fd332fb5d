"""Recomputes norm outputs in the backward pass, so that `lean` need not save them.

A recipe is what the norm saves for its own gradient anyway (x, mean, rstd), and copies of its parameters. An
operator that saves the output gets a placeholder in place of the tensor. A recipe belongs to the graph of its
norm: only the norm's saved tensors and the placeholders refer to it, and it is freed with them. It is looked
up by the storage of the output.

    y₃ = norm(x₃) + y₂,  y₂ = norm(x₂) + y₁,  y₁ = norm(x₁)        x₃, x₂, x₁ are saved; no y is

If a residual or an x is itself such an output, the recipes form a chain, which is recomputed link by link. A
chain ends after `SEGMENT` links: the next output is saved. Outputs that a chain recomputes on its way stay in
memory until their readers have read them.
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

SEGMENT = 4  # links of a chain; all outputs of a chain can be in memory at once in the backward

# By the number of the output's storage, and of the saved tensor's.
_RECIPES: weakref.WeakValueDictionary[int, Recipe] = weakref.WeakValueDictionary()
_SAVED: weakref.WeakValueDictionary[int, SavedTensor] = weakref.WeakValueDictionary()


class SavedTensor:
    """A tensor saved for the backward, with torch's own check for in-place writes."""

    __slots__ = ("__weakref__", "recipe", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = tensor._version
        self.recipe: Recipe | None = None  # keeps the recipe alive as long as the norm's saved tensors

    def unpack(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: the tensor was written to. torch raises the same error, but does not check tensors
                that hooks save.
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


class View(NamedTuple):
    """The part of a storage that a tensor shows."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        """Return the part that `tensor` shows of its storage."""
        return cls(tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset()))

    def within(self, tensor: Tensor) -> Tensor:
        """Return the same part of the storage of `tensor`."""
        return tensor.as_strided(self.size, self.stride, self.offset)


class RecomputedOutput:
    """The placeholder for a norm's output, or a view of it, that an operator saves for the backward."""

    __slots__ = ("__weakref__", "is_read", "recipe", "view")

    def __init__(self, recipe: Recipe, tensor: Tensor) -> None:
        self.recipe = recipe
        self.view = View.of(tensor)
        self.is_read = False  # in the current backward

    def unpack(self) -> Tensor:
        """Return the values, recomputed."""
        self.is_read = True
        with torch.no_grad():
            return self.view.within(self.recipe.output())

    def is_available(self) -> bool:
        """Whether the backward can recompute the output."""
        return self.recipe.is_available()


class SharedResidual:
    """A residual that its norm does not save: usable only if another operator has saved it.

    A norm without an activation needs no residual for its gradient, so its recipe must not keep the residual
    in memory.
    """

    def __init__(self, residual: Tensor) -> None:
        self.storage = _storage(residual)  # while this exists, no other storage gets the same number
        self.view, self.dtype, self.version = View.of(residual), residual.dtype, residual._version
        self.saved: SavedTensor | None = None

    def is_available(self) -> bool:
        """Whether another operator has saved the residual by now."""
        if self.saved is None:
            found = _SAVED.get(self.storage.cdata)
            if found is not None and (found.version, found.tensor.dtype) == (self.version, self.dtype):
                self.saved = found
        return self.saved is not None

    def unpack(self) -> Tensor:
        """Return the residual as the other operator has saved it."""
        assert self.saved is not None, "unpacked before it was available"
        return self.view.within(self.saved.unpack())


class Recipe:
    """Recomputes the output `y` of a norm with the same kernels, bit for bit.

    Args:
        y: the output.
        engine: the engine that computed it.
        call: the call.
        x: the input.
        residual: the residual, or None.
        statistics: mean and rstd, by which the call was normalized.
    """

    def __init__(
        self,
        y: Tensor,
        engine: Engine,
        call: Call,
        x: SavedTensor | RecomputedOutput,
        residual: SavedTensor | RecomputedOutput | SharedResidual | None,
        statistics: Statistics,
    ) -> None:
        self.storage = _storage(y)
        self.version, self.dtype, self.offset = y._version, y.dtype, y.storage_offset()
        self.device = y.device
        self.engine, self.statistics = engine, statistics
        self.activation, self.group_size = call.activation, call.group_size
        self.mask = None if call.mask is None else SavedTensor(call.mask)
        # Copies, as an optimizer may step before the backward.
        parameters = (call.weight, call.bias)
        self.parameters = tuple(None if p is None else p.detach().clone() for p in parameters)
        self.x: SavedTensor | RecomputedOutput | None = x
        self.residual = residual
        before = (s.recipe.links for s in (x, residual) if isinstance(s, RecomputedOutput))
        self.links: int = 1 + max(before, default=0)
        self._readers: list[weakref.ref[RecomputedOutput]] = []
        self.lock = threading.RLock()
        self._output: Tensor | None = None  # recomputed, until all readers have read it
        self._stream: torch.Stream | None = None  # the stream that recomputed it

    def is_available(self) -> bool:
        """Whether the backward will have everything that the recipe needs."""
        with self.lock:
            sources = (s for s in (self.x, self.residual) if isinstance(s, RecomputedOutput | SharedResidual))
            return all(source.is_available() for source in sources)

    def placeholder(self, tensor: Tensor) -> RecomputedOutput:
        """Return a placeholder for the output, or a view of it, that an operator saves."""
        reader = RecomputedOutput(self, tensor)
        self._readers.append(weakref.ref(reader))
        return reader

    def _has_waiting_readers(self) -> bool:
        """Whether an operator that saved the output has not read it in this backward."""
        found = (reference() for reference in self._readers)
        return any(reader is not None and not reader.is_read for reader in found)

    def output(self) -> Tensor:
        """Return the output, recomputed once for all readers in this backward."""
        with self.lock:
            found, stream = self._output, _stream(self.device)
            if self.x is None:
                assert found is not None
                if stream is not None:
                    found.record_stream(stream)
                return found
            if found is None or stream != self._stream:
                found = self._recomputed()
            is_waited_for = self._has_waiting_readers()
            self._output, self._stream = (found, stream) if is_waited_for else (None, None)
            return found

    def _recomputed(self) -> Tensor:
        """Return the output, computed anew."""
        assert self.x is not None
        residual = None if self.residual is None else self.residual.unpack()
        mask = None if self.mask is None else self.mask.unpack()
        weight, bias = self.parameters
        x = self.x.unpack()
        call = Call(x, weight, bias, residual, mask, self.activation, group_size=self.group_size)
        y = self.engine.normalize(call, self.statistics)
        assert y.storage_offset() == self.offset, "a fresh output begins where the first one did"
        return y

    def release(self) -> None:
        """Release the recomputed output, when the norm's own backward begins.

        Every reader that takes part in this backward has read the output by then. A reader that has not run
        yet may run after the norm's saved tensors are gone: the output is then materialized for it, and the
        recipe drops its own tensors.
        """
        with self.lock:
            if self.x is None:
                return
            if self._has_waiting_readers():
                with torch.no_grad():
                    self._output = self.output()
                if self._stream is not None:
                    self._stream.synchronize()  # the stream of the later reader is not known yet
                self.x = self.residual = None
            else:
                self._output = None
                for reference in self._readers:
                    reader = reference()
                    if reader is not None:
                        reader.is_read = False


def _stream(device: torch.device) -> torch.Stream | None:
    """Return the current stream of a device; an output is read only in the stream that recomputed it."""
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


def _storage(tensor: Tensor) -> StorageWeakRef:
    """Return a weak reference to the storage of a tensor."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _key(tensor: Tensor) -> int | None:
    """Return the number of a tensor's storage; None for tensor subclasses and other layouts than strided."""
    is_plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    return tensor.untyped_storage()._cdata if is_plain and tensor.layout is torch.strided else None


def save(tensor: Tensor) -> SavedTensor:
    """Save a tensor as it is."""
    saved = SavedTensor(tensor)
    if not (tensor.is_leaf and tensor.requires_grad):  # parameters are never looked up
        key = _key(tensor)
        if key is not None:
            _SAVED[key] = saved
    return saved


def find(tensor: Tensor) -> Recipe | None:
    """Return the recipe of a tensor, if it shows an unmodified output in the graph of the norm.

    A tensor outside of that graph (`detach`) may be saved for longer than the recipe's tensors exist.
    """
    if tensor.is_leaf or (key := _key(tensor)) is None:
        return None
    found = _RECIPES.get(key)
    if found is None:
        return None
    same = (tensor._version, tensor.dtype) == (found.version, found.dtype)
    return found if same and not tensor.is_neg() and found.is_available() else None


def record(
    y: Tensor, engine: Engine, call: Call, statistics: Statistics, keeps_residual: bool = True
) -> None:
    """Make the recipe of an output, if the norm's own tensors were saved within `lean`.

    Args:
        y: the output, with its graph.
        engine: the engine that computed it.
        call: the call.
        statistics: mean and rstd, the tensors that the norm saves for its gradient.
        keeps_residual: whether a norm with an activation saves the residual for its own gradient.
    """
    if not _SAVED:  # no thread is within `lean`; this check takes a tenth of a microsecond
        return
    residual = call.residual
    key = _key(statistics[0])
    own = None if key is None else _SAVED.get(key)
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
    """Release the recomputed output of a norm whose backward begins; `node` is its node in the graph."""
    found = getattr(node, "recipe", None)
    recipe = None if found is None else found()
    if recipe is not None:
        recipe.release()


def _source(tensor: Tensor) -> SavedTensor | RecomputedOutput:
    """Return the placeholder of a tensor that has a recipe; else save the tensor."""
    recipe = find(tensor)
    return SavedTensor(tensor) if recipe is None else RecomputedOutput(recipe, tensor)


def _residual(
    residual: Tensor | None, is_saved: bool
) -> SavedTensor | RecomputedOutput | SharedResidual | None:
    """Return where a recipe gets the residual from; `is_saved`: the norm saves it for its own gradient."""
    if residual is None:
        return None
    found = _source(residual)
    if isinstance(found, SavedTensor) and not is_saved:
        return SharedResidual(residual)
    return found
