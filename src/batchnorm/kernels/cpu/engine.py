"""Computes the primitives of `interface.Engine` by kernels in Numba.

Its form of statistics is one tensor, `[G + 3 G C]`: count `[G]`, then mean, m2 and rstd `[G, C]` each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm.kernels.eager import constants
from batchnorm.kernels.interface import Call, Coefficients, Moments, RunningState, Statistics
from batchnorm.kernels.layout import is_alike, laid_out_as

from . import huge_pages
from .jit import kernel
from .kernel_args import KernelArgs
from .parallel import FEW, run
from .prepared import EMPTY, Pass, Prepared, copied, increment_version, prepare
from .statistics import CHANNELS

_WIDE = torch.float64


def moments(x: Tensor, *, mask: Tensor | None = None, group_size: int | None = None) -> Moments:
    """See `interface.Engine.moments`."""
    x, prepared = _prepared(x, mask is not None, group_size, None, "moments")
    args, mask = copied(prepared.template), None if mask is None else mask.contiguous()
    args.x = x.data_ptr()
    if mask is not None:
        args.mask = mask.data_ptr()
    statistics, scratch = EMPTY.new_empty(prepared.statistics), EMPTY.new_empty(prepared.scratch)
    args.statistics, args.scratch = statistics.data_ptr(), scratch.data_ptr()
    prepared.run(args)
    return unpack((statistics,), prepared.channels)[0]


def forward(
    call: Call, running: RunningState | None = None, activation_mask: Tensor | None = None
) -> tuple[Tensor, Statistics]:
    """See `interface.Engine.forward`."""
    assert activation_mask is None, "it keeps none"
    x, prepared = _prepared(call.x, call.mask is not None, call.group_size, call.activation, "forward")
    args = copied(prepared.template)
    inputs = _inputs(args, x, prepared.real, call)
    y = huge_pages.empty_like(x) if prepared.is_huge else torch.empty_like(x)
    statistics = EMPTY.new_empty(prepared.statistics)
    args.y, args.eps, args.statistics = y.data_ptr(), call.eps, statistics.data_ptr()
    if prepared.scratch:
        scratch = EMPTY.new_empty(prepared.scratch)
        args.scratch = scratch.data_ptr()
    written = None if running is None else _running(args, running)
    prepared.run(args)
    if written:
        if running is not None and prepared.groups > 1:
            _move_by_groups(args, prepared, running.sequential)
        increment_version(written)
    del inputs
    return y if x is call.x else laid_out_as(call.x, y), (statistics,)


def evaluate(
    call: Call, mean: Tensor, var: Tensor, activation_mask: Tensor | None = None, *, keeps: bool = True
) -> tuple[Tensor, Statistics]:
    """See `interface.Engine.evaluate`."""
    assert activation_mask is None, "it keeps none"
    x, prepared = _prepared(call.x, call.mask is not None, None, call.activation, "evaluate")
    if not (_is_readable(mean, prepared.real) and _is_readable(var, prepared.real)):
        given = constants(mean, var, call.eps)
        return normalize(call, given), given
    args = copied(prepared.template)
    inputs = _inputs(args, x, prepared.real, call)
    y = huge_pages.empty_like(x) if prepared.is_huge else torch.empty_like(x)
    args.y, args.eps = y.data_ptr(), call.eps
    args.running_mean, args.running_var = mean.data_ptr(), var.data_ptr()
    statistics: Statistics = ()
    if keeps or not prepared.is_small:
        statistics = (EMPTY.new_empty(prepared.statistics),)
        args.statistics = statistics[0].data_ptr()
    prepared.run(args)
    del inputs
    return y if x is call.x else laid_out_as(call.x, y), statistics


def normalize(call: Call, statistics: Statistics, activation_mask: Tensor | None = None) -> Tensor:
    """See `interface.Engine.normalize`."""
    assert activation_mask is None, "it keeps none"
    x, prepared = _prepared(call.x, call.mask is not None, call.group_size, call.activation, "normalize")
    args = copied(prepared.template)
    inputs, given = _inputs(args, x, prepared.real, call), _given(args, statistics)
    y = huge_pages.empty_like(x) if prepared.is_huge else torch.empty_like(x)
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
    residual = call.residual
    x, prepared = _prepared(call.x, call.mask is not None, call.group_size, call.activation, "backward")
    args = copied(prepared.template)
    inputs, given = _inputs(args, x, prepared.real, call), _given(args, statistics)
    if dy.stride() != x.stride() or dy.dtype is not x.dtype or dy.is_neg():
        dy = torch.empty_like(x).copy_(dy)
    dx = huge_pages.empty_like(x) if prepared.is_huge else torch.empty_like(x)
    dweight, dbias = _parameters(inputs[0], prepared)
    args.dy, args.dx, args.constant = dy.data_ptr(), dx.data_ptr(), constant
    args.dweight, args.dbias = dweight.data_ptr(), dbias.data_ptr()
    if prepared.scratch:
        scratch = EMPTY.new_empty(prepared.scratch)
        args.scratch = scratch.data_ptr()
    dresidual = None
    if residual is not None:
        dresidual = _output(x, prepared)
        args.dresidual = dresidual.data_ptr()
    if prepared.groups == 1:
        prepared.run(args)
    else:
        _run_groups(args, prepared)
    del inputs, given
    if x is not call.x:
        dx = laid_out_as(call.x, dx)
    if dresidual is not None and residual is not None and not is_alike(dresidual, residual):
        dresidual = laid_out_as(residual, dresidual)
    return dx, dweight, dbias, dresidual


def backward_reduce(call: Call, dy: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """See `interface.Engine.backward_reduce`."""
    x, prepared = _prepared(call.x, call.mask is not None, call.group_size, call.activation, "reduce")
    args = copied(prepared.template)
    inputs, given = _inputs(args, x, prepared.real, call), _given(args, statistics)
    dy = _laid_out(dy, x)
    scratch = EMPTY.new_empty(prepared.scratch)
    args.dy, args.scratch = dy.data_ptr(), scratch.data_ptr()
    prepared.run(args)
    del inputs, given
    groups, channels = prepared.groups, prepared.channels
    start = args.parts * groups + 3 * groups * channels  # behind part_count, a, b and c
    sums = scratch[start : start + 2 * groups * channels].view(2, groups, channels)
    return sums[0], sums[1]


def backward_apply(
    call: Call, dy: Tensor, statistics: Statistics, coefficients: Coefficients
) -> tuple[Tensor, Tensor | None]:
    """See `interface.Engine.backward_apply`."""
    residual = call.residual
    x, prepared = _prepared(call.x, call.mask is not None, call.group_size, call.activation, "apply")
    args = copied(prepared.template)
    inputs, given = _inputs(args, x, prepared.real, call), _given(args, statistics)
    dy = _laid_out(dy, x)
    a, b, c = (_contiguous(values, _WIDE) for values in coefficients)
    args.dy, args.a, args.b, args.c = dy.data_ptr(), a.data_ptr(), b.data_ptr(), c.data_ptr()
    dx, dresidual = _output(x, prepared), None if residual is None else _output(x, prepared)
    args.dx = dx.data_ptr()
    if dresidual is not None:
        args.dresidual = dresidual.data_ptr()
    prepared.run(args)
    del inputs, given
    if x is not call.x:
        dx = laid_out_as(call.x, dx)
    if dresidual is not None and residual is not None and not is_alike(dresidual, residual):
        dresidual = laid_out_as(residual, dresidual)
    return dx, dresidual


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
    )


def _is_writable(values: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a kernel may also write to a tensor."""
    return _is_readable(values, dtype) and not values.requires_grad and not values.is_inference()


def _prepared(
    x: Tensor, masked: bool, group_size: int | None, activation: str | None, what: Pass
) -> tuple[Tensor, Prepared]:
    """Returns x, or a dense copy of it, and the launch for it."""
    prepared = prepare(x.shape, x.stride(), x.dtype, masked, group_size, activation, what)
    if prepared.is_dense and not x.is_neg():
        return x, prepared
    x = x.resolve_neg().contiguous()
    return x, prepare(x.shape, x.stride(), x.dtype, masked, group_size, activation, what)


def _contiguous(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if values.dtype is dtype and values.is_contiguous() else values.to(dtype).contiguous()


def _laid_out(values: Tensor, x: Tensor) -> Tensor:
    """Returns values in the dtype and layout of x."""
    if is_alike(values, x) and not values.is_neg():
        return values
    return torch.empty_like(x).copy_(values)


def _output(x: Tensor, prepared: Prepared) -> Tensor:
    """Returns memory for an output in the layout of x."""
    return huge_pages.empty_like(x) if prepared.is_huge else torch.empty_like(x)


def _inputs(args: KernelArgs, x: Tensor, real: torch.dtype, call: Call) -> tuple[Tensor | None, ...]:
    """Sets the addresses of all inputs but statistics; returns tensors that must outlive the launch."""
    weight, bias, residual, mask = call.weight, call.bias, call.residual, call.mask
    args.x = x.data_ptr()
    if weight is not None:
        if weight.dtype is not real or not weight.is_contiguous():
            weight = weight.to(real).contiguous()
        args.weight = weight.data_ptr()
    if bias is not None:
        if bias.dtype is not real or not bias.is_contiguous():
            bias = bias.to(real).contiguous()
        args.bias = bias.data_ptr()
    if residual is not None:
        residual = _laid_out(residual, x)
        args.residual = residual.data_ptr()
    if mask is not None:
        mask = mask.contiguous()
        args.mask = mask.data_ptr()
    return weight, bias, residual, mask


def _given(args: KernelArgs, statistics: Statistics) -> Statistics:
    """Sets the addresses of statistics; returns tensors that must outlive the launch."""
    if len(statistics) == 1:
        table = _contiguous(statistics[0], _WIDE)
        args.statistics = table.data_ptr()
        return (table,)
    mean, rstd = (_contiguous(values, _WIDE) for values in statistics[:2])
    args.mean, args.rstd = mean.data_ptr(), rstd.data_ptr()
    return mean, rstd


def _parameters(weight: Tensor | None, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Returns memory for dweight and dbias, in the dtype of the arithmetic, which the weight has."""
    if weight is None:
        shape = (prepared.channels,)
        return EMPTY.new_empty(shape, dtype=prepared.real), EMPTY.new_empty(shape, dtype=prepared.real)
    return torch.empty_like(weight), torch.empty_like(weight)


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
