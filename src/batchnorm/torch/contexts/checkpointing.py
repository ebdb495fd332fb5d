"""Keeps what activation checkpointing needs to recompute a forward in the backward.

By then the running statistics have moved, and the mask or domain of the forward may have ended. With later
ones, the recomputed forward would be another function, and have another gradient.

- `Memory` keeps the running statistics that a policy normalizes by. A recompute finds them by the moments of
  its batch, which are the same bits; they are compared on the device, and the host does not wait.
- `Scope` keeps the mask and the domain. A recompute finds them by a hash of its input, and raises where the
  hash does not decide.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import RecomputeError
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import Known
from batchnorm.torch.tracing import is_recomputed, is_transforming, may_be_recomputed

from .domains import ContextLayer, domain_of, selected
from .masks import Masked
from .samples import Samples

# Forwards that one layer remembers. A pipeline that runs the forwards of all micro-batches first has as many.
KEPT = 32

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(values: Tensor) -> Tensor:
    """Return the bits of floating values as integers, so that NaN equals itself."""
    return values.detach().view(_BITS[values.element_size()])


class _KnownForward(NamedTuple):
    """The running statistics of one forward, and the bits of its moments."""

    key: Tensor
    known: Known


class Memory:
    """The running statistics of a layer in its latest forwards that may be recomputed.

    Copies and files of the layer do not include it.
    """

    def __init__(self) -> None:
        self._passes: deque[_KnownForward] = deque(maxlen=KEPT)  # the newest first

    def known(self, known: Known, batch: PooledMoments, training: bool) -> Known:
        """Return the running statistics of the original forward; an original forward stores its own.

        Args:
            known: the running statistics now, as copies that no later step changes.
            batch: moments of this call, `[G, C]`.
            training: the layer's mode.
        """
        if torch.compiler.is_compiling() or is_transforming():
            return known
        if is_recomputed():
            return self._found(known, _key(batch))
        if may_be_recomputed(training):
            self._passes.appendleft(_KnownForward(_key(batch), known))
        return known

    def _found(self, known: Known, key: Tensor) -> Known:
        """Return what the newest forward with these moments stored; without one, `known`."""
        passes = [p for p in self._passes if p.key.shape == key.shape and p.key.device == key.device]
        if not passes:
            return known
        same = (torch.stack([p.key for p in passes]) == key).all(1)
        place = same.to(torch.int8).argmax().view(1)  # the first of several
        is_there = same.any()

        def chosen(now: Tensor | None, noted: list[Tensor | None]) -> Tensor | None:
            tensors = [now if tensor is None else tensor for tensor in noted]
            if now is None:
                return None
            then = torch.stack(tensors).index_select(0, place).squeeze(0)  # type: ignore[arg-type]
            return torch.where(is_there, then, now)

        mean = chosen(known.mean, [p.known.mean for p in passes])
        var = chosen(known.var, [p.known.var for p in passes])
        return known._replace(
            mean=mean, var=var, batches=chosen(known.batches, [p.known.batches for p in passes])
        )


def _key(batch: PooledMoments) -> Tensor:
    """Return the bits of all moments, in one row."""
    return torch.cat([bits(batch.mean).flatten(), bits(batch.m2).flatten()])


class _Within(NamedTuple):
    """The mask and the domain, or domains, that a call takes from its contexts."""

    masked: Masked | None
    domain: int | Samples


class _ScopedForward:
    """A forward that may be recomputed.

    Attributes:
        shape: of its input.
        key: hash of its input.
        within: the contexts that it was in.
        is_done: it has been recomputed.
    """

    def __init__(self, input: Tensor, within: _Within) -> None:
        self.shape, self.key = input.shape, _hash(input)
        self.within = within
        self.is_done = False


class Scope:
    """The contexts that a layer is in, and those of its latest forwards that may be recomputed.

    Copies and files of the layer do not include it.

    Attributes:
        masked: the mask of the innermost `batchnorm.mask`; None = all values count.
        samples: the domains of the innermost `batchnorm.domain`; None = that of the layer, for all samples.
        used: the mask of the latest call.
    """

    def __init__(self) -> None:
        self.masked: Masked | None = None
        self.samples: Samples | None = None
        self.used: Tensor | None = None
        self._passes: deque[_ScopedForward] = deque()  # the newest first
        self._has_forgotten = False

    @property
    def is_over(self) -> bool:
        """Whether the layer needs no scope: it is in no context, and nothing may be recomputed."""
        return self.masked is None and self.samples is None and not self._passes

    def call(
        self, layer: ContextLayer, input: Tensor, residual: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Call the layer in its contexts; a mask that the call itself passes comes first."""
        if torch.compiler.is_compiling():  # the current contexts hold: the compiler itself handles recomputes
            self.used = self.masked.of(input) if mask is None and self.masked is not None else mask
            if self.samples is not None:
                return self.samples.call(layer, input, residual, self.used)
            return layer._normalize(input, residual, self.used)
        within = self._within(layer, input)
        if mask is None and within.masked is not None:
            mask = within.masked.of(input)
        self.used = mask
        if isinstance(within.domain, Samples):
            return within.domain.call(layer, input, residual, mask)
        if within.domain == domain_of(layer):
            return layer._normalize(input, residual, mask)
        with selected(layer, within.domain):
            return layer._normalize(input, residual, mask)

    def _within(self, layer: ContextLayer, input: Tensor) -> _Within:
        """Return the contexts of this call: of a recomputed forward, those of the original one."""
        now = _Within(self.masked, domain_of(layer) if self.samples is None else self.samples)
        if is_recomputed():
            return self._found(input)
        if may_be_recomputed(layer.training):
            kept = [p for p in self._passes if not p.is_done]
            self._has_forgotten |= len(kept) < len(self._passes) or len(kept) >= KEPT
            self._passes = deque([_ScopedForward(input, now), *kept], maxlen=KEPT)
        return now

    def _found(self, input: Tensor) -> _Within:
        """Return the contexts of the original forward, which had the same input."""
        passes = [p for p in self._passes if p.shape == input.shape and p.key.device == input.device]
        same = torch.stack([p.key for p in passes]) == _hash(input) if passes else torch.zeros(0, 2)
        found = [p for p, is_same in zip(passes, same.all(1).tolist(), strict=True) if is_same]
        for one in found:
            one.is_done = True
        within = {one.within for one in found}
        if len(within) == 1:
            return within.pop()
        if not found and not passes and not self._has_forgotten:
            return _Within(None, 0)  # the original forward ran before the layer was in any context
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
    """Return a hash of all bits of an input and of their positions, `[2]` int64.

    The two numbers are sums over samples and over positions of the bits as integers, each with a weight for
    its place. Integers wrap around on overflow, so the sum is the same in any order.
    """
    values = bits(input)
    over_samples = values.sum(0, dtype=torch.long).flatten()
    spatial = list(range(2, values.dim()))
    over_positions = (values.sum(spatial, dtype=torch.long) if spatial else values.long()).flatten()
    return torch.stack([_weighed(over_samples), _weighed(over_positions)])


def _weighed(sums: Tensor) -> Tensor:
    """Return the sum of integers, each times a weight for its place."""
    places = (torch.arange(1, len(sums) + 1, device=sums.device)) * 0x1E3779B97F4A7C15
    return ((places ^ (places >> 29)) * sums).sum()
