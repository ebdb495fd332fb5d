"""One call of the engine: a packet is filled, kernels run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm.kernels.activations import TINY
from batchnorm.kernels.interface import RunningStatistics
from batchnorm.kernels.layout import is_alike, laid_out_as

from . import huge_pages
from .access import LINE
from .activations import BOUNDS, CLAMP, CODES, IDENTITY
from .llvm import LANES
from .packet import Packet
from .plan import SHORT, Plan, plan
from .room import PER_CHANNEL, PER_COLUMN
from .runs import PARAMETERS
from .statistics import CHANNELS
from .tasks import run

_PLANE = 128  # values side by side from which a tensor is normalized as it lies in memory, plane by plane
_PLANES = 2**15  # values of such a task
# Values from which y and dx are written past the caches. In training they come back when much else has been
# through the caches; in evaluation the next layer reads y at once.
_STREAM, _STREAM_GIVEN = 2**19, 2**22


class Call:
    """One call: its tensors in the layout of x, and the packet that the kernels read."""

    def __init__(self, x: Tensor, mask: Tensor | None, group_size: int | None) -> None:
        if x.is_neg():
            x = x.resolve_neg()
        masked = mask is not None
        self.plan: Plan = plan(x.shape, x.stride(), masked, group_size)
        if not self.plan.is_dense:
            x = x.contiguous()
            self.plan = plan(x.shape, x.stride(), masked, group_size)
        self.x = x
        self.real = torch.float64 if x.dtype == torch.float64 else torch.float32  # of the arithmetic
        self.mask = None if mask is None else mask.contiguous()
        self.kept: list[Tensor] = []
        self.packet = packet = Packet()
        (
            _,
            _,
            packet.channels,
            packet.positions,
            packet.groups,
            packet.units,
            packet.group_units,
            packet.parts,
            packet.columns,
            packet.block,
            packet.span,
            _,
        ) = self.plan
        packet.x = self.x.data_ptr()
        if self.mask is not None:
            packet.mask = self.mask.data_ptr()
        packet.low = packet.high = packet.low_kink = packet.high_kink = math.nan  # no bounds

    def affine(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Take weight and bias."""
        self.packet.weight, self.packet.bias = self._parameter(weight), self._parameter(bias)

    def _parameter(self, values: Tensor | None) -> int:
        if values is None:
            return 0
        if values.dtype != self.real or not values.is_contiguous():
            values = values.to(self.real).contiguous()
            self.kept.append(values)
        return values.data_ptr()

    def statistics(self, mean: Tensor, rstd: Tensor) -> None:
        """Take mean and rstd, `[G, C]`."""
        self.packet.mean, self.packet.rstd = self.wide(mean), self.wide(rstd)

    def wide(self, values: Tensor) -> int:
        """Return the address of statistics that are given."""
        if values.dtype != torch.float64 or not values.is_contiguous():
            values = values.to(torch.float64).contiguous()
            self.kept.append(values)
        return values.data_ptr()

    def behind(self, residual: Tensor | None, activation: str | None) -> None:
        """Take what comes behind the normalization."""
        packet = self.packet
        packet.activation = CODES[activation]
        if activation in BOUNDS:
            packet.low, packet.high = packet.low_kink, packet.high_kink = BOUNDS[activation]
            packet.low_kink = TINY.get(self.x.dtype, 0.0)
        if residual is not None:
            packet.residual = self.laid_out(residual)

    def laid_out(self, values: Tensor) -> int:
        """Return the address of values in the dtype and layout of x."""
        if not is_alike(values, self.x) or values.is_neg():
            values = torch.empty_like(self.x).copy_(values)
            self.kept.append(values)
        return values.data_ptr()

    def table(self) -> Tensor:
        """Return a table for a number per group and channel, `[G, C]`."""
        return torch.empty((self.plan.groups, self.plan.channels), dtype=torch.float64)

    def scratch(self, *sizes: int) -> list[int]:
        """Return addresses of room for so many numbers each."""
        room = torch.empty(sum(sizes), dtype=torch.float64)
        self.kept.append(room)
        addresses, free = [], room.data_ptr()
        for size in sizes:
            addresses.append(free)
            free += 8 * size
        return addresses

    def move(self, running: RunningStatistics) -> list[Tensor]:
        """Let the kernel move running statistics; return what it may write to."""
        packet = self.packet
        mean, var, batches, packet.momentum, skipped, sequential = running
        written = []
        if mean is not None:
            packet.running_mean = mean.data_ptr()
            written.append(mean)
        if var is not None:
            packet.running_var = var.data_ptr()
            written.append(var)
        if batches is not None:
            packet.batches = batches.data_ptr()
            written.append(batches)
        if skipped is not None:
            packet.skipped = skipped.data_ptr()
            written.append(skipped)
        if self.plan.groups == 1:
            packet.moves = 1
        else:
            packet.pooled_mean, packet.pooled_m2 = self.scratch(self.plan.channels, self.plan.channels)
            packet.sequential = sequential
        return written

    def output(self) -> Tensor:
        """Return a tensor for y or dx, in the layout of x."""
        return huge_pages.empty_like(self.x)

    def returned(self, output: Tensor, like: Tensor) -> Tensor:
        """Return an output in the dtype and layout of what the caller gave."""
        return output if like is self.x else laid_out_as(like, output)

    def run(self, half: str, *, measure: bool, apply: bool) -> None:
        """Run the forward or the backward kernel: its statistics, its output, or both."""
        packet, plan = self.packet, self.plan
        merges = plan.groups * math.ceil(plan.channels / CHANNELS) if measure and plan.parts > 1 else 0
        passes = 2 if merges and apply else 1
        family, tasks = plan.family, plan.tasks
        is_given = half == "forward" and not measure
        packet.stream = self.x.numel() >= (_STREAM_GIVEN if is_given else _STREAM)
        if family == "planes" and plan.positions < SHORT:
            packet.stream = False  # masked; most of a short run's lines are shared with its neighbours
        if is_given and plan.positions >= _PLANE:
            family, packet.planes = "planes", max(1, _PLANES // plan.positions)
            tasks = math.ceil(plan.units * plan.channels / packet.planes)
            # Of two planes that share a cache line, neither can write it whole, past the caches.
            packet.stream = packet.stream and plan.positions * self.x.element_size() % LINE == 0
        packet.measure, packet.apply = measure, apply
        packet.tasks, packet.merges, packet.total = tasks, merges, passes * tasks + merges
        packet.room = self._room(family)
        simple = not packet.mask and packet.activation in (IDENTITY, CLAMP)
        run(f"{family}_{half}", self.x.dtype, simple, packet, self.x.numel())

    def _room(self, family: str) -> int:
        """Return how many bytes a thread needs to compute in."""
        number = 8 if self.real == torch.float64 else 4
        if family == "planes":
            return PARAMETERS * LANES * number
        wide = min(self.plan.block, self.plan.columns) + LANES
        return (PER_COLUMN * number + PER_CHANNEL * 8) * wide

    def close(self, half: str) -> None:
        """Put several groups together, behind the forward or the backward."""
        packet = self.packet
        packet.tasks = packet.total = math.ceil(self.plan.channels / CHANNELS)
        packet.next = packet.finished = 0
        run(f"groups_{half}", self.real, True, packet, self.plan.groups * self.plan.channels)
