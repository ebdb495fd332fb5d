"""What was heard of the data so far, for all layers in one row of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.statistics.moments import PooledMoments, merge


@dataclass(frozen=True)
class Layout:
    """Where each layer's channels lie in a row of all channels.

    Attributes:
        channels: name of a layer -> its number of channels, in the order of the model.
    """

    channels: Mapping[str, int]

    @classmethod
    def of(cls, norms: Mapping[str, _BatchNorm]) -> Layout:
        """Return the layout of norms by name; a lazy layer that was loaded does not know its number."""
        channels = {name: norm._buffers["running_mean"] for name, norm in norms.items()}
        return cls({name: mean.numel() for name, mean in channels.items() if mean is not None})

    @property
    def total(self) -> int:
        """Number of channels of all layers."""
        return sum(self.channels.values())

    def row(self, heard: Mapping[str, PooledMoments]) -> Tensor:
        """Return counts, means and m2s, `[3, total]` in float64; 0 for a layer that heard nothing."""
        nothing = PooledMoments(0, None, None)
        moments = [heard.get(name, nothing) for name in self.channels]
        channels = torch.tensor(list(self.channels.values()))
        count = torch.tensor([float(found.count) for found in moments], dtype=torch.float64)
        rows = [count.repeat_interleave(channels)]
        for place in ("mean", "m2"):
            parts = [getattr(found, place) for found in moments]
            silent = zip(parts, self.channels.values(), strict=True)
            parts = [torch.zeros(size) if part is None else part.cpu() for part, size in silent]
            rows.append(torch.cat(parts).double())
        return torch.stack(rows)

    def split(self, row: Tensor) -> dict[str, PooledMoments]:
        """Return the moments of each layer that heard anything."""
        parts = torch.split(row, list(self.channels.values()), 1)
        found = {
            name: PooledMoments(part[0, 0], part[1], part[2])
            for name, part in zip(self.channels, parts, strict=True)
        }
        return {name: moments for name, moments in found.items() if moments.count > 0}


@dataclass
class Tally:
    """One pass over the data, as far as it has gone.

    Attributes:
        layout: of `pooled`.
        samples: how many went through the model.
        batches: how many.
        values: how many per channel arrived at each layer.
        dependent: layers whose input came through a layer that had no statistics of the whole data yet.
        pooled: counts, means and m2s, `[3, total]`, of all batches.
    """

    layout: Layout
    samples: int
    batches: int
    values: dict[str, int]
    dependent: frozenset[str]
    pooled: Tensor

    @classmethod
    def empty(cls, layout: Layout) -> Tally:
        """Return the tally before the first batch."""
        return cls(layout, 0, 0, {}, frozenset(), layout.row({}))

    @property
    def moments(self) -> dict[str, PooledMoments]:
        """The moments of each layer that heard anything."""
        return self.layout.split(self.pooled)

    def with_batch(
        self,
        samples: int,
        heard: Mapping[str, PooledMoments],
        values: Mapping[str, int],
        dependent: Iterable[str],
    ) -> Tally:
        """Return the tally after one more batch; this one is as before."""
        one = Tally(self.layout, samples, 1, dict(values), frozenset(dependent), self.layout.row(heard))
        return self.merged(one)

    def merged(self, other: Tally) -> Tally:
        """Return the tally of both."""
        pooled = merge(PooledMoments(*self.pooled), PooledMoments(*other.pooled))
        names = self.values.keys() | other.values.keys()
        return Tally(
            self.layout,
            self.samples + other.samples,
            self.batches + other.batches,
            {name: self.values.get(name, 0) + other.values.get(name, 0) for name in names},
            self.dependent | other.dependent,
            torch.stack(tuple(pooled)),
        )

    @staticmethod
    def length(layout: Layout) -> int:
        """Return how many numbers `numbers` has."""
        return 2 + 2 * len(layout.channels) + 3 * layout.total

    def numbers(self) -> Tensor:
        """Return all of this in one row of float64 (integers are exact up to 2⁵³)."""
        names = self.layout.channels
        head = [self.samples, self.batches]
        head += [self.values.get(name, 0) for name in names]
        head += [name in self.dependent for name in names]
        return torch.cat((torch.tensor(head, dtype=torch.float64), self.pooled.flatten()))

    @classmethod
    def from_numbers(cls, layout: Layout, numbers: Tensor) -> Tally:
        """Return what `numbers` was made of."""
        names = list(layout.channels)
        head, pooled = numbers[: -3 * layout.total], numbers[-3 * layout.total :]
        samples, batches, *rest = (int(number) for number in head.tolist())
        values = dict(zip(names, rest[: len(names)], strict=True))
        flags = zip(names, rest[len(names) :], strict=True)
        dependent = frozenset(name for name, flag in flags if flag)
        return cls(layout, samples, batches, values, dependent, pooled.view(3, -1).clone())
