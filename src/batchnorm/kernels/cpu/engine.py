"""The Numba engine: see `interface.Engine`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from batchnorm.kernels.interface import Coefficients, Moments, RunningStatistics

from .call import Call
from .kernel_args import KernelArgs
from .parallel import run

_REALS = (torch.float32, torch.float64)  # dtypes that running statistics have here


def moments(x: Tensor, *, mask: Tensor | None = None, group_size: int | None = None) -> Moments:
    """See `interface.Engine.moments`."""
    call = Call(x, mask, group_size)
    return _measured(call, 0.0, apply=False)[0]


def _measured(call: Call, eps: float, *, apply: bool) -> tuple[Moments, Tensor]:
    args = call.args
    count = torch.empty(call.partition.groups, dtype=torch.float64)
    mean, m2, rstd = call.table(), call.table(), call.table()
    args.count, args.mean, args.m2 = count.data_ptr(), mean.data_ptr(), m2.data_ptr()
    args.rstd, args.eps = rstd.data_ptr(), eps
    if call.partition.parts == 1:
        args.part_count, args.part_mean, args.part_m2 = args.count, args.mean, args.m2
    else:
        groups, table = call.partition.parts * count.numel(), call.partition.parts * mean.numel()
        args.part_count, args.part_mean, args.part_m2 = call.scratch(groups, table, table)
    call.run("forward", measure=True, apply=apply)
    return Moments(count, mean, m2), rstd


def normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    group_size: int | None = None,
) -> Tensor:
    """See `interface.Engine.normalize`."""
    call = Call(x, mask, group_size)
    call.affine(weight, bias)
    call.statistics(mean, rstd)
    call.behind(residual, activation)
    y = call.output()
    call.args.y = y.data_ptr()
    call.run("forward", measure=False, apply=True)
    return call.returned(y, x)


def forward(
    x: Tensor,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    group_size: int | None = None,
    running: RunningStatistics | None = None,
) -> tuple[Tensor, Moments, Tensor]:
    """See `interface.Engine.forward`."""
    call = Call(x, mask, group_size)
    call.affine(weight, bias)
    call.behind(residual, activation)
    y = call.output()
    call.args.y = y.data_ptr()
    written = None if running is None else call.move(running)
    found, rstd = _measured(call, eps, apply=True)
    if written is not None:
        if call.partition.groups > 1:
            call.close("forward")
        increment_version(written)
    return call.returned(y, x), found, rstd


def _backward_call(
    x: Tensor,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    mask: Tensor | None,
    group_size: int | None,
) -> Call:
    call = Call(x, mask, group_size)
    call.affine(weight, bias)
    call.statistics(mean, rstd)
    call.behind(residual, activation)
    call.args.dy = call.laid_out(dy)
    return call


def _with_sums(call: Call) -> None:
    """Make workspace for the gradient's sums and coefficients."""
    args, groups, parts = call.args, call.partition.groups, call.partition.parts
    table = groups * call.partition.channels
    args.part_count, args.a, args.b, args.c, args.sum_dy, args.sum_dy_xhat = call.scratch(
        parts * groups, *[table] * 5
    )
    args.part_dy, args.part_dy_xhat = args.sum_dy, args.sum_dy_xhat
    if parts > 1:
        args.part_dy, args.part_dy_xhat = call.scratch(parts * table, parts * table)


def _with_parameters(call: Call) -> tuple[Tensor, Tensor]:
    """Return tensors for dweight and dbias, `[C]`; the kernel fills them for a call with one group."""
    dweight, dbias = (torch.empty(call.partition.channels, dtype=call.real) for _ in range(2))
    if call.partition.groups == 1:
        call.args.dweight, call.args.dbias = dweight.data_ptr(), dbias.data_ptr()
    return dweight, dbias


def _with_outputs(call: Call, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dx = call.output()
    dresidual = None if residual is None else call.output()
    call.args.dx = dx.data_ptr()
    if dresidual is not None:
        call.args.dresidual = dresidual.data_ptr()
    return dx, dresidual


def backward_reduce(
    x: Tensor,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `interface.Engine.backward_reduce`."""
    call = _backward_call(x, dy, mean, rstd, weight, bias, residual, activation, mask, group_size)
    _with_sums(call)
    sums = call.table(), call.table()
    call.args.sum_dy, call.args.sum_dy_xhat = (t.data_ptr() for t in sums)
    if call.partition.parts == 1:
        call.args.part_dy, call.args.part_dy_xhat = call.args.sum_dy, call.args.sum_dy_xhat
    call.run("backward", measure=True, apply=False)
    return sums


def backward_apply(
    x: Tensor,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    coefficients: Coefficients,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `interface.Engine.backward_apply`."""
    call = _backward_call(x, dy, mean, rstd, weight, bias, residual, activation, mask, group_size)
    call.args.a, call.args.b, call.args.c = map(call.wide, coefficients)
    dx, dresidual = _with_outputs(call, residual)
    call.run("backward", measure=False, apply=True)
    return call.returned(dx, x), None if dresidual is None or residual is None else call.returned(
        dresidual, residual
    )


def backward(
    x: Tensor,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    given: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `interface.Engine.backward`."""
    call = _backward_call(x, dy, mean, rstd, weight, bias, residual, activation, mask, group_size)
    _with_sums(call)
    call.args.constant = given
    dweight, dbias = _with_parameters(call)
    dx, dresidual = _with_outputs(call, residual)
    call.run("backward", measure=True, apply=True)
    if call.partition.groups > 1:
        call.args.dweight, call.args.dbias = dweight.data_ptr(), dbias.data_ptr()
        call.close("backward")
    return (
        call.returned(dx, x),
        dweight,
        dbias,
        None if dresidual is None or residual is None else call.returned(dresidual, residual),
    )


def activation_mask(x: Tensor, activation: str | None, group_size: int | None) -> Tensor | None:  # noqa: ARG001
    """See `interface.Engine.activation_mask`: it keeps none."""
    return None


def given(running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """See `interface.Engine.given`."""
    real = running_mean.dtype
    if real not in _REALS or not (_is_plain(running_mean, real) and _is_plain(running_var, real)):
        return None
    args, shape = KernelArgs(), (1, running_mean.numel())
    mean, rstd = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    args.channels, args.mean, args.rstd, args.eps = shape[1], mean.data_ptr(), rstd.data_ptr(), eps
    args.running_mean, args.running_var = running_mean.data_ptr(), running_var.data_ptr()
    run("take_running", real, True, args, 0)
    return mean, rstd


def moves(x: Tensor, running: RunningStatistics) -> bool:
    """See `interface.Engine.moves`."""
    mean, var, batches, _, skipped, _ = running
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        (mean is None or _is_plain(mean, real))
        and (var is None or _is_plain(var, real))
        and (batches is None or _is_plain(batches, torch.int64))
        and (skipped is None or _is_plain(skipped, torch.int64))
    )


def _is_plain(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor may be read and written by its address."""
    return (
        (type(values) is Tensor or type(values) is torch.nn.Parameter)
        and values.dtype == dtype
        and values.is_cpu
        and values.is_contiguous()
        and not values.requires_grad
        and not values.is_inference()
    )
