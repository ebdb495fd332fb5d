"""The Numba engine: see `interface.Engine`.

Its form of statistics is one tensor, `[G + 3 G C]`: count `[G]`, then mean, m2 and rstd `[G, C]` each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from batchnorm.kernels.eager import constants
from batchnorm.kernels.interface import Call, Coefficients, Moments, RunningState, Statistics
from batchnorm.kernels.layout import is_alike, laid_out_as

from . import huge_pages
from .jit import kernel
from .kernel_args import KernelArgs
from .parallel import FEW, run
from .prepared import Pass, Prepared, prepare
from .statistics import CHANNELS

_WIDE = torch.float64
_BYTES = 8  # of a number of the statistics


def moments(x: Tensor, *, mask: Tensor | None = None, group_size: int | None = None) -> Moments:
    """See `interface.Engine.moments`."""
    x, prepared = _prepared(x, mask, group_size, None, "moments")
    args, mask = prepared.args(), None if mask is None else mask.contiguous()
    args.x, args.mask = x.data_ptr(), _address(mask)
    statistics = _statistics(args, prepared)
    parts = _with_parts(args, prepared) if prepared.parts > 1 else None
    prepared.run(args)
    del parts
    return unpack((statistics,), prepared.channels)[0]


def forward(
    call: Call, running: RunningState | None = None, activation_mask: Tensor | None = None
) -> tuple[Tensor, Statistics]:
    """See `interface.Engine.forward`."""
    assert activation_mask is None, "it keeps none"
    x, prepared = _prepared(call.x, call.mask, call.group_size, call.activation, "forward")
    args = prepared.args()
    inputs = _inputs(args, x, prepared, call)
    y = huge_pages.empty_like(x) if prepared.is_huge else torch.empty_like(x)
    args.y, args.eps = y.data_ptr(), call.eps
    statistics = _statistics(args, prepared)
    parts = _with_parts(args, prepared) if prepared.parts > 1 else None
    if running is None:
        prepared.run(args)
    else:
        written = _running(args, running)
        args.moves = prepared.groups == 1
        prepared.run(args)
        if prepared.groups > 1:
            _move_by_groups(args, prepared, running.sequential)
        increment_version(written)
    del inputs, parts
    return y if x is call.x else laid_out_as(call.x, y), (statistics,)


def evaluate(
    call: Call, mean: Tensor, var: Tensor, activation_mask: Tensor | None = None
) -> tuple[Tensor, Statistics]:
    """See `interface.Engine.evaluate`."""
    assert activation_mask is None, "it keeps none"
    real = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    if not (_is_readable(mean, real) and _is_readable(var, real)):
        statistics: Statistics = constants(mean, var, call.eps)
        return normalize(call, statistics), statistics
    x, prepared = _prepared(call.x, call.mask, None, call.activation, "normalize")
    args = prepared.args()
    inputs = _inputs(args, x, prepared, call)
    y = _output(x, prepared)
    args.y, args.eps = y.data_ptr(), call.eps
    table = _statistics(args, prepared)
    args.running_mean, args.running_var, args.takes = mean.data_ptr(), var.data_ptr(), 1
    prepared.run(args)
    del inputs
    return y if x is call.x else laid_out_as(call.x, y), (table,)


def normalize(call: Call, statistics: Statistics, activation_mask: Tensor | None = None) -> Tensor:
    """See `interface.Engine.normalize`."""
    assert activation_mask is None, "it keeps none"
    x, prepared = _prepared(call.x, call.mask, call.group_size, call.activation, "normalize")
    args = prepared.args()
    inputs = _inputs(args, x, prepared, call)
    given = _given(args, prepared, statistics)
    y = _output(x, prepared)
    args.y = y.data_ptr()
    prepared.run(args)
    del inputs, given
    return y if x is call.x else laid_out_as(call.x, y)


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
    x, prepared = _prepared(call.x, call.mask, call.group_size, call.activation, "backward")
    args, channels, real = prepared.args(), prepared.channels, prepared.real
    inputs = _inputs(args, x, prepared, call)
    given = _given(args, prepared, statistics)
    if dy.stride() != x.stride() or dy.dtype is not x.dtype or dy.is_neg():
        dy = torch.empty_like(x).copy_(dy)
    args.dy, args.constant = dy.data_ptr(), constant
    scratch = _with_sums(args, prepared)
    dx = huge_pages.empty_like(x) if prepared.is_huge else torch.empty_like(x)
    args.dx = dx.data_ptr()
    residual, dresidual = call.residual, None
    if residual is not None:
        dresidual = _output(x, prepared)
        args.dresidual = dresidual.data_ptr()
    weight = inputs[0]
    if weight is None:
        dweight, dbias = torch.empty(channels, dtype=real), torch.empty(channels, dtype=real)
    else:  # without options, in two thirds of the time
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    if prepared.groups == 1:
        args.dweight, args.dbias = dweight.data_ptr(), dbias.data_ptr()
        prepared.run(args)
    else:
        prepared.run(args)
        args.dweight, args.dbias = dweight.data_ptr(), dbias.data_ptr()
        _run_over_groups("groups_backward", args, prepared)
    del inputs, given, scratch
    if x is not call.x:
        dx = laid_out_as(call.x, dx)
    if dresidual is not None:
        dresidual = _as_the_residual(dresidual, residual)
    return dx, dweight, dbias, dresidual


def backward_reduce(call: Call, dy: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """See `interface.Engine.backward_reduce`."""
    x, prepared = _prepared(call.x, call.mask, call.group_size, call.activation, "reduce")
    args = prepared.args()
    inputs = _inputs(args, x, prepared, call)
    given = _given(args, prepared, statistics)
    dy = _laid_out(dy, x)
    args.dy = dy.data_ptr()
    scratch = _with_sums(args, prepared)
    sum_dy, sum_dy_xhat = torch.empty(2, prepared.groups, prepared.channels, dtype=_WIDE).unbind()
    args.sum_dy, args.sum_dy_xhat = sum_dy.data_ptr(), sum_dy_xhat.data_ptr()
    if prepared.parts == 1:
        args.part_dy, args.part_dy_xhat = args.sum_dy, args.sum_dy_xhat
    prepared.run(args)
    del inputs, given, scratch
    return sum_dy, sum_dy_xhat


def backward_apply(
    call: Call, dy: Tensor, statistics: Statistics, coefficients: Coefficients
) -> tuple[Tensor, Tensor | None]:
    """See `interface.Engine.backward_apply`."""
    x, prepared = _prepared(call.x, call.mask, call.group_size, call.activation, "apply")
    args = prepared.args()
    inputs = _inputs(args, x, prepared, call)
    given = _given(args, prepared, statistics)
    dy = _laid_out(dy, x)
    a, b, c = (_contiguous(values, _WIDE) for values in coefficients)
    args.dy, args.a, args.b, args.c = dy.data_ptr(), a.data_ptr(), b.data_ptr(), c.data_ptr()
    dx, dresidual = _gradients(args, x, prepared, call.residual)
    prepared.run(args)
    del inputs, given
    if x is not call.x:
        dx = laid_out_as(call.x, dx)
    return dx, _as_the_residual(dresidual, call.residual)


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
    """See `interface.Engine.activation_mask`: it keeps none."""
    return None


def _is_readable(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel may read a tensor of such numbers by its address."""
    return (
        (type(values) is Tensor or type(values) is torch.nn.Parameter)
        and values.dtype == dtype
        and values.is_cpu
        and values.is_contiguous()
    )


def _is_writable(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel may write to it, too."""
    return _is_readable(values, dtype) and not values.requires_grad and not values.is_inference()


def _prepared(
    x: Tensor, mask: Tensor | None, group_size: int | None, activation: str | None, what: Pass
) -> tuple[Tensor, Prepared]:
    """Return x, or a dense copy of it, and the launch for it."""
    masked = mask is not None
    prepared = prepare(x.shape, x.stride(), x.dtype, masked, group_size, activation, what)
    if prepared.is_dense and not x.is_neg():
        return x, prepared
    x = x.resolve_neg().contiguous()
    return x, prepare(x.shape, x.stride(), x.dtype, masked, group_size, activation, what)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _contiguous(values: Tensor, dtype: torch.dtype) -> Tensor:
    if values.dtype == dtype and values.is_contiguous():
        return values
    return values.to(dtype).contiguous()


def _laid_out(values: Tensor, x: Tensor) -> Tensor:
    """Return values in the dtype and layout of x."""
    if is_alike(values, x) and not values.is_neg():
        return values
    return torch.empty_like(x).copy_(values)


def _inputs(args: KernelArgs, x: Tensor, prepared: Prepared, call: Call) -> tuple[Tensor | None, ...]:
    """Set the addresses of what a call reads besides statistics; return what is to outlive the launch."""
    weight, bias, residual, mask = call.weight, call.bias, call.residual, call.mask
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
    return weight, bias, residual, mask


def _statistics(args: KernelArgs, prepared: Prepared) -> Tensor:
    """Return memory for the statistics, in this engine's form, which the kernel fills."""
    groups, size = prepared.groups, prepared.groups * prepared.channels
    table = torch.empty(groups + 3 * size, dtype=_WIDE)
    args.count = args.part_count = start = table.data_ptr()
    args.mean = args.part_mean = mean = start + _BYTES * groups
    args.m2 = args.part_m2 = m2 = mean + _BYTES * size
    args.rstd = m2 + _BYTES * size
    return table


def _given(args: KernelArgs, prepared: Prepared, statistics: Statistics) -> Statistics:
    """Set the addresses of statistics; return what is to outlive the call."""
    if len(statistics) == 1:
        groups = prepared.groups
        args.mean = mean = statistics[0].data_ptr() + _BYTES * groups
        args.rstd = mean + 2 * _BYTES * groups * prepared.channels
        return statistics
    own_mean, rstd = (_contiguous(values, _WIDE) for values in statistics[:2])
    args.mean, args.rstd = own_mean.data_ptr(), rstd.data_ptr()
    return own_mean, rstd


def _with_parts(args: KernelArgs, prepared: Prepared) -> Tensor:
    """Return memory for the moments of parts."""
    groups = prepared.parts * prepared.groups
    size = groups * prepared.channels
    scratch = torch.empty(groups + 2 * size, dtype=_WIDE)
    args.part_count = start = scratch.data_ptr()
    args.part_mean = start + _BYTES * groups
    args.part_m2 = start + _BYTES * (groups + size)
    return scratch


def _with_sums(args: KernelArgs, prepared: Prepared) -> Tensor:
    """Return memory for the gradient's sums and coefficients, of parts too."""
    parts, groups = prepared.parts, prepared.groups
    size = groups * prepared.channels
    scratch = torch.empty(parts * groups + (5 if parts == 1 else 5 + 2 * parts) * size, dtype=_WIDE)
    args.part_count = start = scratch.data_ptr()
    step = _BYTES * size
    args.a = start = start + _BYTES * parts * groups
    args.b, args.c, args.sum_dy, args.sum_dy_xhat = (
        start + step,
        start + 2 * step,
        start + 3 * step,
        start + 4 * step,
    )
    args.part_dy, args.part_dy_xhat = args.sum_dy, args.sum_dy_xhat
    if parts > 1:
        args.part_dy, args.part_dy_xhat = start + 5 * step, start + (5 + parts) * step
    return scratch


def _output(x: Tensor, prepared: Prepared) -> Tensor:
    """Return memory for y or dx, in the layout of x."""
    return huge_pages.empty_like(x) if prepared.is_huge else torch.empty_like(x)


def _gradients(
    args: KernelArgs, x: Tensor, prepared: Prepared, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return memory for dx and dresidual, in the layout of x."""
    dx = _output(x, prepared)
    args.dx = dx.data_ptr()
    if residual is None:
        return dx, None
    dresidual = _output(x, prepared)
    args.dresidual = dresidual.data_ptr()
    return dx, dresidual


def _as_the_residual(dresidual: Tensor | None, residual: Tensor | None) -> Tensor | None:
    """Return dresidual in the dtype and layout of the residual."""
    if dresidual is None or residual is None or is_alike(dresidual, residual):
        return dresidual
    return laid_out_as(residual, dresidual)


def _running(args: KernelArgs, running: RunningState) -> list[Tensor]:
    """Set the addresses of running statistics that the kernel moves, and return them."""
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
    """Move the running statistics by several groups."""
    pooled = torch.empty(2 * prepared.channels, dtype=_WIDE)
    args.pooled_mean = pooled.data_ptr()
    args.pooled_m2 = args.pooled_mean + _BYTES * prepared.channels
    args.sequential = sequential
    _run_over_groups("groups_forward", args, prepared)


def _run_over_groups(name: str, args: KernelArgs, prepared: Prepared) -> None:
    """Put several groups together, behind the forward or the backward."""
    args.tasks = args.total = tasks = math.ceil(prepared.channels / CHANNELS)
    args.next = args.finished = 0
    is_small = prepared.groups * prepared.channels <= FEW
    run(kernel(name, prepared.real, True), args, 1 if is_small else tasks)
