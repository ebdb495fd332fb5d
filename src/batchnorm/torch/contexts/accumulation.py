"""The moments of several micro-batches, until they move a layer's running statistics as one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchnorm.statistics.moments import PooledMoments, merge
from batchnorm.torch.running_stats import Moved, is_finite, moved, pooled_groups, write

from .domains import domain_of, selected

if TYPE_CHECKING:
    from batchnorm.torch.layers import _Layer


class _Accumulated:
    """What the micro-batches of one domain have in common.

    Attributes:
        moments: of all values, `[C]`, wide.
        counted: whether any micro-batch counts: True, or a tensor where the device alone knows.
        skipped: how many do not, as they have inf or NaN.
    """

    def __init__(self, moments: PooledMoments, counted: bool | Tensor, skipped: int | Tensor) -> None:
        self.moments, self.counted, self.skipped = moments, counted, skipped

    def with_(self, other: _Accumulated) -> _Accumulated:
        """Return both together."""
        return _Accumulated(
            merge(self.moments, other.moments), self.counted | other.counted, self.skipped + other.skipped
        )


class Accumulator:
    """The moments of a layer's calls within `batchnorm.accumulate`; per channel, nothing else is kept.

    It belongs to no copy of the layer and to no file.

    Args:
        layer: whose calls these are.
    """

    def __init__(self, layer: _Layer) -> None:
        self.layer = layer
        self._now: dict[int, _Accumulated] = {}  # of the forward that goes on, by domain
        self._all: dict[int, _Accumulated] = {}  # of those that have come to an end

    def __deepcopy__(self, _: dict[int, object]) -> None:
        return None

    def __reduce__(self) -> tuple[object, ...]:
        return type(None), ()

    def add(self, batch: PooledMoments, *, skip: bool) -> None:
        """Take the moments of a call, `[G, C]`.

        Args:
            batch: the moments.
            skip: leave them out where they are not finite, and count that.
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
        """Begin a forward; what one that has not come to an end has left is dropped."""
        self._now = {}

    def end(self) -> None:
        """End a forward: what its calls had counts."""
        for domain, one in self._now.items():
            self._all[domain] = self._all[domain].with_(one) if domain in self._all else one
        self._now = {}

    def flush(self) -> None:
        """Move the running statistics by all forwards that have come to an end, as by one batch."""
        found, self._all = self._all, {}
        if not self.layer.statistics.moves(training=True):  # frozen meanwhile
            return
        for domain, one in found.items():
            with selected(self.layer, domain):
                _move(self.layer, one)


def _move(layer: _Layer, one: _Accumulated) -> None:
    running = layer._running_state()
    device = None if running.mean is None else running.mean.device
    count, mean, m2 = one.moments
    batch = PooledMoments(
        count.reshape(1, 1).to(device) if isinstance(count, Tensor) else count,
        mean[None].to(device),
        m2[None].to(device),
    )
    after = moved(running._replace(sequential=False), batch, skip=False)
    if isinstance(one.counted, Tensor):  # it may be that no micro-batch counts: then there was no batch
        fine = one.counted.to(device)
        mean, var = (
            None if old is None or new is None else torch.where(fine, new, old.to(new.dtype))
            for old, new in ((running.mean, after.mean), (running.var, after.var))
        )
        assert isinstance(one.skipped, Tensor)
        after = Moved(mean, var, fine.long(), one.skipped.to(device))
    write(running, after)
