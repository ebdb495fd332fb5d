"""Prepares launches of kernels, once for all calls that have the same shape, strides, dtype and options.

Deciding how a tensor is cut, and filling a kernel's record, take longer than the kernel of a small layer.
Both depend on no value and no address, and are kept: a call copies the record, sets addresses, and runs.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Literal

import torch

from batchnorm.kernels.activations import TINY

from .access import LINE
from .activations import BOUNDS, CLAMP, CODES, IDENTITY
from .elementwise import PARAMETERS
from .jit import kernel
from .kernel_args import KernelArgs
from .llvm import LANES
from .parallel import FEW, run, worker
from .partition import SHORT, Partition, partition
from .row_layout import PER_CHANNEL, PER_COLUMN
from .statistics import CHANNELS

# `EMPTY.new_empty(n)` takes two thirds of the time of `torch.empty(n, dtype=torch.float64)`.
EMPTY = torch.empty(0, dtype=torch.float64)
copied = KernelArgs.from_buffer_copy  # of `Prepared.template`
increment_version = torch._C._increment_version  # `torch.autograd.graph.increment_version` of a list

# What a launch computes: the moments, y by given statistics, y by running statistics, or moments and y; the
# gradient's sums, dx by given coefficients, or both.
Pass = Literal["moments", "normalize", "evaluate", "forward", "reduce", "apply", "backward"]

_KEPT = 1024  # launches; the least recently used one goes
# The fields of a partition that a kernel's record has, too.
_CUT = ("channels", "positions", "groups", "units", "group_units", "parts", "columns", "block", "span")
_PLANE = 128  # values side by side from which a tensor is normalized as it lies in memory, plane by plane
_PLANES = 2**15  # values of such a task
# Values from which y and dx are written past the caches. In training they come back when much else has been
# through the caches; in evaluation the next layer reads y at once.
_STREAM, _STREAM_GIVEN = 2**19, 2**22
_HUGE = 2**22  # bytes from which an output is worth huge pages
_FEW_GIVEN = 2**16  # values from which threads are worth waking for one pass over them
_NUMBER = 8  # bytes of a number of statistics or scratch


class Prepared:
    """A launch for calls of one kind.

    Attributes:
        is_dense: whether the tensor is laid out as one of the two that there are kernels for.
        channels, groups: C and G.
        statistics: how many numbers count, mean, m2 and rstd are.
        scratch: how many further numbers a pass needs; 0 where its only thread has memory for them.
        real: dtype of the arithmetic, and of weight and bias.
        is_small: whether one thread runs it.
        is_huge: whether outputs are worth huge pages.
        template: the record of a call, as bytes, in which addresses are missing.
    """

    __slots__ = (
        "_kernel",
        "_tasks",
        "_work",
        "channels",
        "groups",
        "is_dense",
        "is_huge",
        "is_small",
        "real",
        "scratch",
        "statistics",
        "template",
    )

    def __init__(
        self,
        cut: Partition,
        values: int,
        args: KernelArgs,
        kernel_name: str,
        dtype: torch.dtype,
        masked: bool,
        what: Pass,
    ) -> None:
        size, parts = cut.groups * cut.channels, cut.parts
        self.is_dense, self.channels, self.groups = cut.is_dense, cut.channels, cut.groups
        self.real = torch.float64 if dtype == torch.float64 else torch.float32
        self.is_huge = values * dtype.itemsize >= _HUGE
        few = _FEW_GIVEN if what in ("normalize", "evaluate") else FEW
        self.is_small = values <= few or args.tasks == 1
        self.statistics, self.scratch = cut.groups + 3 * size, 0
        if what in ("moments", "forward") and parts > 1:
            self.scratch = parts * (cut.groups + 2 * size)
        elif what in ("reduce", "backward"):
            self.scratch = parts * cut.groups + (5 if parts == 1 else 5 + 2 * parts) * size
        if self.is_small and what == "evaluate":
            args.local = _NUMBER * self.statistics
        elif self.is_small and what == "backward":
            args.local, self.scratch = _NUMBER * self.scratch, 0
        self.template = bytes(args)
        self._tasks = args.tasks
        self._kernel = kernel(kernel_name, dtype, not masked and args.activation in (IDENTITY, CLAMP))
        self._work: Callable[[int], None] = worker(self._kernel)

    def run(self, args: KernelArgs) -> None:
        """Runs the kernel."""
        if self.is_small:
            self._work(ctypes.addressof(args))
        else:
            run(self._kernel, args, self._tasks)


@functools.lru_cache(maxsize=_KEPT)
def prepare(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    masked: bool,
    group_size: int | None,
    activation: str | None,
    what: Pass,
) -> Prepared:
    """Returns the launch for a tensor `[N, C, *S]` that is not empty; for one that is not dense, of a copy.

    Args:
        shape, stride, dtype: of the tensor.
        masked: some positions do not count.
        group_size: samples per statistics group; None = all.
        activation: its name, or None.
        what: what to compute.
    """
    is_backward, is_given = what in ("reduce", "apply", "backward"), what in ("normalize", "evaluate")
    cut = partition(shape, stride, masked, group_size, is_given)
    args, values = KernelArgs(), math.prod(shape)
    for name in _CUT:
        setattr(args, name, getattr(cut, name))
    args.measure = what in ("moments", "forward", "reduce", "backward")
    args.apply = what not in ("moments", "reduce")
    args.moves, args.takes = what == "forward" and cut.groups == 1, what == "evaluate"
    args.activation = CODES[activation]
    args.low = args.high = args.low_kink = args.high_kink = math.nan  # no bounds
    if activation in BOUNDS:
        args.low, args.high = args.low_kink, args.high_kink = BOUNDS[activation]
        args.low_kink = TINY.get(dtype, 0.0)
    args.merges = cut.groups * math.ceil(cut.channels / CHANNELS) if args.measure and cut.parts > 1 else 0
    passes = 2 if args.merges and args.apply else 1
    family, args.tasks = cut.family, cut.tasks
    args.stream = values >= (_STREAM_GIVEN if is_given else _STREAM)
    if family == "planes" and cut.positions < SHORT:
        args.stream = False  # masked; most of a short run's lines are shared with its neighbours
    if is_given and cut.positions >= _PLANE:
        family, args.planes = "planes", max(1, _PLANES // cut.positions)
        args.tasks = math.ceil(cut.units * cut.channels / args.planes)
        # Of two planes that share a cache line, neither can write it whole, past the caches.
        args.stream = args.stream and cut.positions * dtype.itemsize % LINE == 0
    args.total = passes * args.tasks + args.merges
    args.workspace = _workspace(family, cut, 8 if dtype == torch.float64 else 4)
    name = f"{family}_{'backward' if is_backward else 'forward'}"
    return Prepared(cut, values, args, name, dtype, masked, what)


def _workspace(family: str, cut: Partition, number: int) -> int:
    """Returns how many bytes a thread computes in; `number`: bytes of a number of the arithmetic."""
    if family == "planes":
        return PARAMETERS * LANES * number
    wide = min(cut.block, cut.columns) + LANES
    return -(-(PER_COLUMN * number + PER_CHANNEL * 8) * wide // 64) * 64
