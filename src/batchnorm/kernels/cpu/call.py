"""One call of the engine: a args is filled, kernels run."""

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
from .elementwise import PARAMETERS
from .kernel_args import KernelArgs
from .llvm import LANES
from .parallel import run
from .partition import SHORT, Partition, partition
from .row_layout import PER_CHANNEL, PER_COLUMN
from .statistics import CHANNELS

_PLANE = 128  # values side by side from which a tensor is normalized as it lies in memory, plane by plane
_PLANES = 2**15  # values of such a task
# Values from which y and dx are written past the caches. In training they come back when much else has been
# through the caches; in evaluation the next layer reads y at once.
_STREAM, _STREAM_GIVEN = 2**19, 2**22


class Call:
    """One call: its tensors in the layout of x, and the args that the kernels read."""

    def __init__(self, x: Tensor, mask: Tensor | None, group_size: int | None) -> None:
        if x.is_neg():
            x = x.resolve_neg()
        masked = mask is not None
        self.partition: Partition = partition(x.shape, x.stride(), masked, group_size)
        if not self.partition.is_dense:
            x = x.contiguous()
            self.partition = partition(x.shape, x.stride(), masked, group_size)
        self.x = x
        self.real = torch.float64 if x.dtype == torch.float64 else torch.float32  # of the arithmetic
        self.mask = None if mask is None else mask.contiguous()
        self.kept: list[Tensor] = []
        self.args = args = KernelArgs()
        (
            _,
            _,
            args.channels,
            args.positions,
            args.groups,
            args.units,
            args.group_units,
            args.parts,
            args.columns,
            args.block,
            args.span,
            _,
        ) = self.partition
        args.x = self.x.data_ptr()
        if self.mask is not None:
            args.mask = self.mask.data_ptr()
        args.low = args.high = args.low_kink = args.high_kink = math.nan  # no bounds

    def affine(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Take weight and bias."""
        self.args.weight, self.args.bias = self._parameter(weight), self._parameter(bias)

    def _parameter(self, values: Tensor | None) -> int:
        if values is None:
            return 0
        if values.dtype != self.real or not values.is_contiguous():
            values = values.to(self.real).contiguous()
            self.kept.append(values)
        return values.data_ptr()

    def statistics(self, mean: Tensor, rstd: Tensor) -> None:
        """Take mean and rstd, `[G, C]`."""
        self.args.mean, self.args.rstd = self.wide(mean), self.wide(rstd)

    def wide(self, values: Tensor) -> int:
        """Return the address of statistics that are given."""
        if values.dtype != torch.float64 or not values.is_contiguous():
            values = values.to(torch.float64).contiguous()
            self.kept.append(values)
        return values.data_ptr()

    def behind(self, residual: Tensor | None, activation: str | None) -> None:
        """Take what comes behind the normalization."""
        args = self.args
        args.activation = CODES[activation]
        if activation in BOUNDS:
            args.low, args.high = args.low_kink, args.high_kink = BOUNDS[activation]
            args.low_kink = TINY.get(self.x.dtype, 0.0)
        if residual is not None:
            args.residual = self.laid_out(residual)

    def laid_out(self, values: Tensor) -> int:
        """Return the address of values in the dtype and layout of x."""
        if not is_alike(values, self.x) or values.is_neg():
            values = torch.empty_like(self.x).copy_(values)
            self.kept.append(values)
        return values.data_ptr()

    def table(self) -> Tensor:
        """Return a table for a number per group and channel, `[G, C]`."""
        return torch.empty((self.partition.groups, self.partition.channels), dtype=torch.float64)

    def scratch(self, *sizes: int) -> list[int]:
        """Return addresses of workspace for so many numbers each."""
        workspace = torch.empty(sum(sizes), dtype=torch.float64)
        self.kept.append(workspace)
        addresses, free = [], workspace.data_ptr()
        for size in sizes:
            addresses.append(free)
            free += 8 * size
        return addresses

    def move(self, running: RunningStatistics) -> list[Tensor]:
        """Let the kernel move running statistics; return what it may write to."""
        args = self.args
        mean, var, batches, args.momentum, skipped, sequential = running
        written = []
        if mean is not None:
            args.running_mean = mean.data_ptr()
            written.append(mean)
        if var is not None:
            args.running_var = var.data_ptr()
            written.append(var)
        if batches is not None:
            args.batches = batches.data_ptr()
            written.append(batches)
        if skipped is not None:
            args.skipped = skipped.data_ptr()
            written.append(skipped)
        if self.partition.groups == 1:
            args.moves = 1
        else:
            args.pooled_mean, args.pooled_m2 = self.scratch(self.partition.channels, self.partition.channels)
            args.sequential = sequential
        return written

    def output(self) -> Tensor:
        """Return a tensor for y or dx, in the layout of x."""
        return huge_pages.empty_like(self.x)

    def returned(self, output: Tensor, like: Tensor) -> Tensor:
        """Return an output in the dtype and layout of what the caller gave."""
        return output if like is self.x else laid_out_as(like, output)

    def run(self, half: str, *, measure: bool, apply: bool) -> None:
        """Run the forward or the backward kernel: its statistics, its output, or both."""
        args, partition = self.args, self.partition
        merges = (
            partition.groups * math.ceil(partition.channels / CHANNELS)
            if measure and partition.parts > 1
            else 0
        )
        passes = 2 if merges and apply else 1
        family, tasks = partition.family, partition.tasks
        is_given = half == "forward" and not measure
        args.stream = self.x.numel() >= (_STREAM_GIVEN if is_given else _STREAM)
        if family == "planes" and partition.positions < SHORT:
            args.stream = False  # masked; most of a short run's lines are shared with its neighbours
        if is_given and partition.positions >= _PLANE:
            family, args.planes = "planes", max(1, _PLANES // partition.positions)
            tasks = math.ceil(partition.units * partition.channels / args.planes)
            # Of two planes that share a cache line, neither can write it whole, past the caches.
            args.stream = args.stream and partition.positions * self.x.element_size() % LINE == 0
        args.measure, args.apply = measure, apply
        args.tasks, args.merges, args.total = tasks, merges, passes * tasks + merges
        args.workspace = self._workspace(family)
        simple = not args.mask and args.activation in (IDENTITY, CLAMP)
        run(f"{family}_{half}", self.x.dtype, simple, args, self.x.numel())

    def _workspace(self, family: str) -> int:
        """Return how many bytes a thread needs to compute in."""
        number = 8 if self.real == torch.float64 else 4
        if family == "planes":
            return PARAMETERS * LANES * number
        wide = min(self.partition.block, self.partition.columns) + LANES
        return (PER_COLUMN * number + PER_CHANNEL * 8) * wide

    def close(self, half: str) -> None:
        """Put several groups together, behind the forward or the backward."""
        args = self.args
        args.tasks = args.total = math.ceil(self.partition.channels / CHANNELS)
        args.next = args.finished = 0
        run(f"groups_{half}", self.real, True, args, self.partition.groups * self.partition.channels)
