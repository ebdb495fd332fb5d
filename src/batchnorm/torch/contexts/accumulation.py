"""Accumulates the moments of several micro-batches, which move the running statistics as one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.statistics.moments import PooledMoments, merge
from batchnorm.torch.moments import is_finite, pooled_groups
from batchnorm.torch.running_stats import moved, write

from .domains import ContextLayer, domain_of, selected


class _Accumulated:
    """The accumulated moments of the micro-batches of one domain.

    Attributes:
        moments: of all values that count, `[C]`, wide.
        counted: whether any micro-batch counts: True, or a tensor where the result is on the device.
        skipped: the number of micro-batches that do not count, because they have inf or NaN.
    """

    def __init__(self, moments: PooledMoments, counted: bool | Tensor, skipped: int | Tensor) -> None:
        self.moments, self.counted, self.skipped = moments, counted, skipped

    def with_(self, other: _Accumulated) -> _Accumulated:
        """Return the moments of both together."""
        return _Accumulated(
            merge(self.moments, other.moments), self.counted | other.counted, self.skipped + other.skipped
        )


class Accumulator:
    """The moments of a layer's calls within `batchnorm.accumulate`, per channel.

    Copies and files of the layer do not include it.

    Args:
        layer: the layer whose calls are accumulated.
    """

    def __init__(self, layer: ContextLayer) -> None:
        self.layer = layer
        self._now: dict[int, _Accumulated] = {}  # of the current forward, by domain
        self._all: dict[int, _Accumulated] = {}  # of finished forwards, by domain

    def add(self, batch: PooledMoments, *, skip: bool) -> None:
        """Add the moments of a call, `[G, C]`.

        Args:
            batch: the moments.
            skip: leave the moments out where they are not finite, and count the batch as skipped.
        """
        found = pooled_groups(PooledMoments(batch.count, batch.mean.detach(), batch.m2.detach()))
        one = _Accumulated(found, True, 0)
        if skip:
            fine = is_finite(batch)
            nothing = torch.zeros_like(found.mean)
            moments = PooledMoments(
                found.count * fine.to(nothing.dtype),
                torch.where(fine, found.mean, nothing),
                torch.where(fine, found.m2, nothing),
            )
            one = _Accumulated(moments, fine, (~fine).long())
        domain = domain_of(self.layer)
        self._now[domain] = self._now[domain].with_(one) if domain in self._now else one

    def begin(self) -> None:
        """Begin a forward; the moments of an unfinished one, which raised, are dropped."""
        self._now = {}

    def end(self) -> None:
        """End a forward, whose moments then count."""
        for domain, one in self._now.items():
            self._all[domain] = self._all[domain].with_(one) if domain in self._all else one
        self._now = {}

    def flush(self) -> None:
        """Move the running statistics by all finished forwards, as by one batch."""
        found, self._all = self._all, {}
        if not self.layer.statistics.moves(training=True):  # frozen meanwhile
            return
        for domain, one in found.items():
            with selected(self.layer, domain):
                _move(self.layer, one)


def _move(layer: ContextLayer, one: _Accumulated) -> None:
    """Move the running statistics in use by accumulated moments."""
    running = layer._running_state()
    device = None if running.mean is None else running.mean.device
    count, mean, m2 = one.moments
    batch = PooledMoments(
        count.reshape(1, 1).to(device) if isinstance(count, Tensor) else count,
        mean[None].to(device),
        m2[None].to(device),
    )
    is_counted = one.counted.to(device) if isinstance(one.counted, Tensor) else None
    after = moved(running._replace(sequential=False), batch, is_counted=is_counted)
    if isinstance(one.skipped, Tensor):
        after = after._replace(skipped=one.skipped.to(device))
    write(running, after)
