"""Packs what was accumulated into rows of numbers, as other ranks and progress files take it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.models.norms.kinds import BatchNormBase
from batchnorm.statistics.calibration import Accumulator
from batchnorm.statistics.moments import PooledMoments


def on_host(moments: Mapping[str, PooledMoments]) -> dict[str, PooledMoments]:
    """Return moments in float64 in the CPU's memory, without those of no values; this waits for a GPU."""
    found = {
        name: PooledMoments(float(of.count), of.mean.cpu().double(), of.m2.cpu().double())
        for name, of in moments.items()
    }
    return {name: of for name, of in found.items() if of.count > 0}


@dataclass(frozen=True)
class Layout:
    """Says where each layer lies in a row of numbers.

    Attributes:
        channels: number of channels by the name of the layer, in the order of the model.
    """

    channels: Mapping[str, int]

    @classmethod
    def of(cls, norms: Mapping[str, BatchNormBase]) -> Layout:
        """Return the layout of norms by name; a lazy layer that was loaded does not know its number."""
        means = {name: norm._buffers["running_mean"] for name, norm in norms.items()}
        return cls({name: mean.numel() for name, mean in means.items() if mean is not None})

    @property
    def total(self) -> int:
        """Number of channels of all layers."""
        return sum(self.channels.values())

    @property
    def length(self) -> int:
        """Number of numbers that `packed` returns."""
        return 2 + 2 * len(self.channels) + 3 * self.total

    def row(self, moments: Mapping[str, PooledMoments]) -> Tensor:
        """Return counts, means and m2s, `[3, total]` in float64; 0 for a layer that is missing."""
        parts = []
        for name, size in self.channels.items():
            part = torch.zeros(3, size, dtype=torch.float64)
            if name in moments:
                part[0], part[1], part[2] = moments[name]
            parts.append(part)
        return torch.cat(parts, 1)

    def split(self, row: Tensor) -> dict[str, PooledMoments]:
        """Return the moments of each layer from such a row; one that counted nothing is missing."""
        parts = zip(self.channels, torch.split(row, list(self.channels.values()), 1), strict=True)
        found: dict[str, PooledMoments] = {
            name: PooledMoments(float(part[0, 0]), part[1].clone(), part[2].clone()) for name, part in parts
        }
        return {name: moments for name, moments in found.items() if moments.count > 0}

    def packed(self, accumulated: Accumulator) -> Tensor:
        """Return all of an accumulator in one row of float64, where integers are exact up to 2⁵³."""
        head = [accumulated.samples, accumulated.batches]
        head += [accumulated.arrivals[name] for name in self.channels]
        head += [name in accumulated.dependent for name in self.channels]
        return torch.cat((torch.tensor(head, dtype=torch.float64), self.row(accumulated.moments).flatten()))

    def unpacked(self, numbers: Tensor) -> Accumulator:
        """Return the accumulator of such a row.

        Raises:
            ValueError: a count is not finite.
        """
        head, moments = numbers[: -3 * self.total].tolist(), numbers[-3 * self.total :]
        samples, batches, *rest = map(int, head)
        arrivals = dict(zip(self.channels, rest[: len(self.channels)], strict=True))
        flags = zip(self.channels, rest[len(self.channels) :], strict=True)
        dependent = {name for name, flag in flags if flag}
        return Accumulator(samples, batches, self.split(moments.view(3, -1)), dependent, Counter(arrivals))
