"""Computes the primitives of `interface.Engine` by kernels in Numba.

Its form of statistics is one tensor, `[G + 3 G C]`: count `[G]`, then mean, m2 and rstd `[G, C]` each.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from batchnorm.kernels.eager import constants
from batchnorm.kernels.interface import Call, Coefficients, Moments, RunningState, Statistics
from batchnorm.kernels.layout import in_memory, is_alike, laid_out_as, shows_values

from . import huge_pages
from .jit import kernel
from .kernel_args import KernelArgs
from .parallel import FEW, run
from .prepared_launch import EMPTY, Pass, Prepared, copied, increment_version, prepare
from .statistics import CHANNELS

_WIDE = torch.float64


class _Launch:
    """One launch: a copy of the prepared record, in which it sets the addresses of a call's tensors.

    It refers to whatever the record has the address of, so that nothing is freed while the kernel runs.

    Attributes:
        x: input of the call, or a dense copy of it.
        prepared: what was prepared for it.
        args: the record.
        weight: weight of the call, in the dtype of the arithmetic.
    """

    __slots__ = ("_held", "_x", "args", "prepared", "weight", "x")

    def __init__(self, call: Call, what: Pass, group_size: int | None) -> None:
        x, weight, bias, residual, mask = call.x, call.weight, call.bias, call.residual, call.mask
        self._x = x
        options = (mask is not None, group_size, call.activation, what)
        prepared = prepare(x.shape, x.stride(), x.dtype, *options)
        if not prepared.is_dense or not shows_values(x):
            x = in_memory(x).contiguous()
            prepared = prepare(x.shape, x.stride(), x.dtype, *options)
        self.x, self.prepared, self.args = x, prepared, copied(prepared.template)
        args = self.args
        args.x = x.data_ptr()
        if weight is not None:
            weight = _contiguous(weight, prepared.real)
            args.weight = weight.data_ptr()
        if bias is not None:
            bias = _contiguous(bias, prepared.real)
            args.bias = bias.data_ptr()
        if residual is not None:
            residual = _laid_out(residual, x)
            args.residual = residual.data_ptr()
        if mask is not None:
            mask = mask.contiguous()
            args.mask = mask.data_ptr()
        self.weight = weight
        self._held: tuple[Tensor | None, ...] = (bias, residual, mask)

    def give(self, statistics: Statistics) -> None:
        """Sets the addresses of given statistics."""
        if len(statistics) == 1:
            table = _contiguous(statistics[0], _WIDE)
            self.args.statistics = table.data_ptr()
            self._held += (table,)
        else:
            mean, rstd = (_contiguous(values, _WIDE) for values in statistics[:2])
            self.args.mean, self.args.rstd = mean.data_ptr(), rstd.data_ptr()
            self._held += (mean, rstd)

    def statistics(self) -> Tensor:
        """Returns memory for the statistics."""
        table = EMPTY.new_empty(self.prepared.statistics)
        self.args.statistics = table.data_ptr()
        return table

    def scratch(self) -> Tensor:
        """Returns memory that the pass needs besides."""
        scratch = EMPTY.new_empty(self.prepared.scratch)
        self.args.scratch = scratch.data_ptr()
        self._held += (scratch,)
        return scratch

    def output(self) -> Tensor:
        """Returns memory for an output in the layout of x."""
        return huge_pages.empty_like(self.x) if self.prepared.is_huge else torch.empty_like(self.x)

    def returned(self, output: Tensor) -> Tensor:
        """Returns an output in the layout of the call's own x."""
        return output if self.x is self._x else laid_out_as(self._x, output)


def moments(call: Call) -> Moments:
    """See `interface.Engine.moments`."""
    launch = _Launch(call, "moments", call.group_size)
    statistics, _ = launch.statistics(), launch.scratch()
    launch.prepared.run(launch.args)
    return unpack((statistics,), launch.prepared.channels)[0]


def forward(
    call: Call, running: RunningState | None = None, activation_mask: Tensor | None = None
) -> tuple[Tensor, Statistics]:
    """See `interface.Engine.forward`."""
    assert activation_mask is None, "it keeps none"
    launch = _Launch(call, "forward", call.group_size)
    args, prepared = launch.args, launch.prepared
    y, statistics = launch.output(), launch.statistics()
    args.y, args.eps = y.data_ptr(), call.eps
    if prepared.scratch:
        launch.scratch()
    written = None if running is None else _running(args, running)
    prepared.run(args)
    if written:
        if running is not None and prepared.groups > 1:
            _move_by_groups(args, prepared, running.sequential)
        increment_version(written)
    return launch.returned(y), (statistics,)


def evaluate(
    call: Call, mean: Tensor, var: Tensor, activation_mask: Tensor | None = None, *, keeps: bool = True
) -> tuple[Tensor, Statistics]:
    """See `interface.Engine.evaluate`."""
    assert activation_mask is None, "it keeps none"
    real = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    if not (_is_readable(mean, real) and _is_readable(var, real)):
        given = constants(mean, var, call.eps)
        return normalize(call, given), given
    launch = _Launch(call, "evaluate", None)
    args, y = launch.args, launch.output()
    args.y, args.eps = y.data_ptr(), call.eps
    args.running_mean, args.running_var = mean.data_ptr(), var.data_ptr()
    statistics = (launch.statistics(),) if keeps or not launch.prepared.is_small else ()
    launch.prepared.run(args)
    return launch.returned(y), statistics


def normalize(call: Call, statistics: Statistics, activation_mask: Tensor | None = None) -> Tensor:
    """See `interface.Engine.normalize`."""
    assert activation_mask is None, "it keeps none"
    launch = _Launch(call, "normalize", call.group_size)
    launch.give(statistics)
    y = launch.output()
    launch.args.y = y.data_ptr()
    launch.prepared.run(launch.args)
    return launch.returned(y)


def unpack(statistics: Statistics, channels: int) -> tuple[Moments, Tensor]:
    """See `interface.Engine.unpack`."""
    (table,) = statistics
    groups = table.numel() // (1 + 3 * channels)
    mean, m2, rstd = table[groups:].view(3, groups, channels).unbind()
    return Moments(table[:groups], mean, m2), rstd


def backward(
    call: Call,
    dy: Tensor,
    statistics: Statistics,
    constant: bool,
    activation_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `interface.Engine.backward`."""
    assert activation_mask is None, "it keeps none"
    launch = _Launch(call, "backward", call.group_size)
    args, prepared = launch.args, launch.prepared
    launch.give(statistics)
    dweight, dbias = _parameters(launch.weight, prepared)
    args.constant, args.dweight, args.dbias = constant, dweight.data_ptr(), dbias.data_ptr()
    if prepared.scratch:
        launch.scratch()
    dx, dresidual = _differentiated(launch, call, dy, _run if prepared.groups == 1 else _run_groups)
    return dx, dweight, dbias, dresidual


def backward_reduce(call: Call, dy: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """See `interface.Engine.backward_reduce`."""
    launch = _Launch(call, "reduce", call.group_size)
    args, prepared = launch.args, launch.prepared
    launch.give(statistics)
    dy, scratch = _laid_out(dy, launch.x), launch.scratch()
    args.dy = dy.data_ptr()
    prepared.run(args)
    groups, channels = prepared.groups, prepared.channels
    start = args.parts * groups + 3 * groups * channels  # behind part_count, a, b and c
    sums = scratch[start : start + 2 * groups * channels].view(2, groups, channels)
    return sums[0], sums[1]


def backward_apply(
    call: Call, dy: Tensor, statistics: Statistics, coefficients: Coefficients
) -> tuple[Tensor, Tensor | None]:
    """See `interface.Engine.backward_apply`."""
    launch = _Launch(call, "apply", call.group_size)
    launch.give(statistics)
    a, b, c = (_contiguous(values, _WIDE) for values in coefficients)
    launch.args.a, launch.args.b, launch.args.c = a.data_ptr(), b.data_ptr(), c.data_ptr()
    return _differentiated(launch, call, dy, _run)


def _differentiated(
    launch: _Launch, call: Call, dy: Tensor, run: Callable[[KernelArgs, Prepared], None]
) -> tuple[Tensor, Tensor | None]:
    """Runs a backward, and returns dx and dresidual in the layouts of x and of the residual."""
    residual = call.residual
    dy, dx, dresidual = _laid_out(dy, launch.x), launch.output(), None
    launch.args.dy, launch.args.dx = dy.data_ptr(), dx.data_ptr()
    if residual is not None:
        dresidual = launch.output()
        launch.args.dresidual = dresidual.data_ptr()
    run(launch.args, launch.prepared)
    if dresidual is not None and residual is not None and not is_alike(dresidual, residual):
        dresidual = laid_out_as(residual, dresidual)
    return launch.returned(dx), dresidual


def moves(x: Tensor, running: RunningState) -> bool:
    """See `interface.Engine.moves`."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        isinstance(running.momentum, float | int)
        and (running.mean is None or _is_writable(running.mean, real))
        and (running.var is None or _is_writable(running.var, real))
        and (running.batches is None or _is_writable(running.batches, torch.int64))
        and (running.skipped is None or _is_writable(running.skipped, torch.int64))
    )


def activation_mask(call: Call) -> Tensor | None:  # noqa: ARG001
    """See `interface.Engine.activation_mask`: this engine keeps none."""
    return None


def _is_readable(values: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a kernel may read a tensor of such numbers by its address."""
    return (
        (type(values) is Tensor or type(values) is torch.nn.Parameter)
        and values.dtype is dtype
        and values.is_cpu
        and values.is_contiguous()
        and shows_values(values)
    )


def _is_writable(values: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a kernel may also write to a tensor."""
    return _is_readable(values, dtype) and not values.requires_grad and not values.is_inference()


def _contiguous(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns numbers of a dtype, side by side in memory."""
    if values.dtype is dtype and values.is_contiguous() and shows_values(values):
        return values
    return in_memory(values).to(dtype).contiguous()


def _laid_out(values: Tensor, x: Tensor) -> Tensor:
    """Returns values in the dtype and layout of x."""
    if is_alike(values, x) and shows_values(values):
        return values
    return torch.empty_like(x).copy_(values)


def _parameters(weight: Tensor | None, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Returns memory for dweight and dbias, in the dtype of the arithmetic, which the weight has."""
    like = EMPTY.new_empty(prepared.channels, dtype=prepared.real) if weight is None else weight
    return torch.empty_like(like), torch.empty_like(like)


def _running(args: KernelArgs, running: RunningState) -> list[Tensor]:
    """Sets the addresses of running statistics that the kernel moves, and returns them."""
    mean, var, batches, skipped = running.mean, running.var, running.batches, running.skipped
    args.momentum = running.momentum
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
    return written


def _move_by_groups(args: KernelArgs, prepared: Prepared, sequential: bool) -> None:
    """Moves the running statistics by several groups, whose moments are computed."""
    pooled = EMPTY.new_empty(2, prepared.channels)
    args.pooled_mean, args.pooled_m2 = (row.data_ptr() for row in pooled)
    args.sequential = sequential
    _run_over_groups("groups_forward", args, prepared)


def _run(args: KernelArgs, prepared: Prepared) -> None:
    prepared.run(args)


def _run_groups(args: KernelArgs, prepared: Prepared) -> None:
    """Runs a backward of several groups, and then adds up their dweight and dbias."""
    addresses = args.dweight, args.dbias
    args.dweight = args.dbias = 0
    scratch = EMPTY.new_empty(args.local // EMPTY.element_size())
    if args.local:  # the sums are needed afterwards
        args.scratch, args.local = scratch.data_ptr(), 0
    prepared.run(args)
    args.dweight, args.dbias = addresses
    _run_over_groups("groups_backward", args, prepared)


def _run_over_groups(name: str, args: KernelArgs, prepared: Prepared) -> None:
    """Merges several groups, after a forward or a backward."""
    args.tasks = args.total = tasks = math.ceil(prepared.channels / CHANNELS)
    args.next = args.finished = 0
    is_small = prepared.groups * prepared.channels <= FEW
    run(kernel(name, prepared.real, True), args, 1 if is_small else tasks)
