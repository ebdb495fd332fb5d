"""The contexts that a layer is in: a mask of the model's input, and a domain; and those of a recompute.

Activation checkpointing computes a pass again in the backward, where its context may be over, or another one
may be there. So a layer that was in a context notes which one each pass had that may come again, together
with a hash of its input's bits; a recompute looks its own up. Where that leaves any doubt, it raises.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import RecomputeError
from batchnorm.torch.tracing import is_recomputed, may_be_recomputed

from .domains import domain_of, selected
from .masks import Masked
from .recomputed import KEPT, bits

if TYPE_CHECKING:
    from batchnorm.torch.layers import _Layer


class _Within(NamedTuple):
    """What a call takes from contexts: the mask, and the domain."""

    masked: Masked | None
    domain: int


class _Pass:
    """A pass that may come again.

    Attributes:
        shape: of its input.
        key: hash of its input.
        within: the contexts that it was in.
        is_done: it has come again.
    """

    def __init__(self, input: Tensor, within: _Within) -> None:
        self.shape, self.key = input.shape, _hash(input)
        self.within = within
        self.is_done = False


class Scope:
    """The contexts that a layer is in, and those of its latest passes that may come again.

    It belongs to no copy of the layer and to no file.

    Attributes:
        masked: of the innermost `batchnorm.mask`; None = all values count.
        used: the mask of the latest call.
    """

    def __init__(self) -> None:
        self.masked: Masked | None = None
        self.used: Tensor | None = None
        self._passes: deque[_Pass] = deque()  # the newest first
        self._has_forgotten = False

    def __deepcopy__(self, _: dict[int, object]) -> None:
        return None

    def __reduce__(self) -> tuple[object, ...]:
        return type(None), ()

    @property
    def is_over(self) -> bool:
        """Whether the layer is as one that was never in a mask's context."""
        return self.masked is None and not self._passes

    def call(self, layer: _Layer, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """Call the layer in its contexts; a mask that it was given itself comes first."""
        if torch.compiler.is_compiling():  # contexts are those of now: the compiler itself knows a recompute
            self.used = self.masked.of(input) if mask is None and self.masked is not None else mask
            return layer._normalize(input, residual, self.used)
        within = self._within(layer, input)
        if mask is None and within.masked is not None:
            mask = within.masked.of(input)
        self.used = mask
        if within.domain == domain_of(layer):
            return layer._normalize(input, residual, mask)
        with selected(layer, within.domain):
            return layer._normalize(input, residual, mask)

    def _within(self, layer: _Layer, input: Tensor) -> _Within:
        now = _Within(self.masked, domain_of(layer))
        if is_recomputed():
            return self._found(input)
        if may_be_recomputed(layer.training):
            kept = [p for p in self._passes if not p.is_done]
            self._has_forgotten |= len(kept) < len(self._passes) or len(kept) >= KEPT
            self._passes = deque([_Pass(input, now), *kept], maxlen=KEPT)
        return now

    def _found(self, input: Tensor) -> _Within:
        """Return what the first pass was in."""
        passes = [p for p in self._passes if p.shape == input.shape and p.key.device == input.device]
        same = torch.stack([p.key for p in passes]) == _hash(input) if passes else torch.zeros(0, 2)
        found = [p for p, is_same in zip(passes, same.all(1).tolist(), strict=True) if is_same]
        for one in found:
            one.is_done = True
        within = {one.within for one in found}
        if len(within) == 1:
            return within.pop()
        if not found and not passes and not self._has_forgotten:
            return _Within(None, 0)  # its first pass was before the layer was in any context
        raise RecomputeError(_SAME_INPUT if found else _NOT_KNOWN)


_AGAIN = "activation checkpointing computes a forward again, and which mask or domain it had the first time "
_SAME_INPUT = _AGAIN + (
    "cannot be told: two forwards had the same input in different contexts. Keep one of them out of it"
)
_NOT_KNOWN = _AGAIN + (
    "is not known: its input is that of none of the latest forwards, bit for bit. Let what is before this "
    "layer be deterministic, and put forwards that are to have no mask into batchnorm.mask(model, None)"
)


def _hash(input: Tensor) -> Tensor:
    """Return two numbers that tell inputs apart by all of their bits and where these are, `[2]` int64.

    Sums over samples, and over positions, of the bits as integers, each weighed by a number of its place.
    Integers that overflow wrap around: the sum is the same in any order.
    """
    values = bits(input)
    over_samples = values.sum(0, dtype=torch.long).flatten()
    spatial = list(range(2, values.dim()))
    over_positions = (values.sum(spatial, dtype=torch.long) if spatial else values.long()).flatten()
    return torch.stack([_weighed(over_samples), _weighed(over_positions)])


def _weighed(sums: Tensor) -> Tensor:
    places = (torch.arange(1, len(sums) + 1, device=sums.device)) * 0x1E3779B97F4A7C15
    return ((places ^ (places >> 29)) * sums).sum()
