"""The Numba engine: see `interface.Engine`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from batchnorm.kernels.interface import Coefficients, Moments, RunningStatistics

from . import huge_pages
from .access import LINE
from .activations import BOUNDS, CLAMP, CODES, IDENTITY
from .packet import Packet
from .plan import Plan, plan
from .statistics import CHANNELS
from .tasks import run

_PLANE = 128  # values side by side from which a tensor is normalized as it lies in memory, plane by plane
_PLANES = 2**15  # values of such a task
# Values from which y and dx are written past the caches. In training they come back when much else has been
# through the caches; in evaluation the next layer reads y at once.
_STREAM, _STREAM_GIVEN = 2**19, 2**22

_REALS = (torch.float32, torch.float64)  # dtypes that running statistics have here

# The largest numbers that round to 0: where y is 0, the derivative of relu is.
_TINY = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


def _is_alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride()


class _Call:
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
            packet.low_kink = _TINY.get(self.x.dtype, 0.0)
        if residual is not None:
            packet.residual = self.laid_out(residual)

    def laid_out(self, values: Tensor) -> int:
        """Return the address of values in the dtype and layout of x."""
        if not _is_alike(values, self.x) or values.is_neg():
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
        if like is self.x:
            return output
        wanted = torch.empty_like(like)
        return output if _is_alike(output, wanted) else wanted.copy_(output)

    def run(self, half: str, *, measure: bool, apply: bool) -> None:
        """Run the forward or the backward kernel: its statistics, its output, or both."""
        packet, plan = self.packet, self.plan
        merges = plan.groups * math.ceil(plan.channels / CHANNELS) if measure and plan.parts > 1 else 0
        passes = 2 if merges and apply else 1
        family, tasks = plan.family, plan.tasks
        is_given = half == "forward" and not measure
        packet.stream = self.x.numel() >= (_STREAM_GIVEN if is_given else _STREAM)
        if is_given and plan.positions >= _PLANE:
            family, packet.planes = "planes", max(1, _PLANES // plan.positions)
            tasks = math.ceil(plan.units * plan.channels / packet.planes)
            # Of two planes that share a cache line, neither can write it whole, past the caches.
            packet.stream = packet.stream and plan.positions * self.x.element_size() % LINE == 0
        packet.measure, packet.apply = measure, apply
        packet.tasks, packet.merges, packet.total = tasks, merges, passes * tasks + merges
        simple = not packet.mask and packet.activation in (IDENTITY, CLAMP)
        run(f"{family}_{half}", self.x.dtype, simple, packet, self.x.numel())

    def close(self, half: str) -> None:
        """Put several groups together, behind the forward or the backward."""
        packet = self.packet
        packet.tasks = packet.total = math.ceil(self.plan.channels / CHANNELS)
        packet.next = packet.finished = 0
        run(f"groups_{half}", self.real, True, packet, self.plan.groups * self.plan.channels)


def moments(x: Tensor, *, mask: Tensor | None = None, group_size: int | None = None) -> Moments:
    """See `interface.Engine.moments`."""
    call = _Call(x, mask, group_size)
    return _measured(call, 0.0, apply=False)[0]


def _measured(call: _Call, eps: float, *, apply: bool) -> tuple[Moments, Tensor]:
    packet = call.packet
    count = torch.empty(call.plan.groups, dtype=torch.float64)
    mean, m2, rstd = call.table(), call.table(), call.table()
    packet.count, packet.mean, packet.m2 = count.data_ptr(), mean.data_ptr(), m2.data_ptr()
    packet.rstd, packet.eps = rstd.data_ptr(), eps
    if call.plan.parts == 1:
        packet.part_count, packet.part_mean, packet.part_m2 = packet.count, packet.mean, packet.m2
    else:
        groups, table = call.plan.parts * count.numel(), call.plan.parts * mean.numel()
        packet.part_count, packet.part_mean, packet.part_m2 = call.scratch(groups, table, table)
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
    call = _Call(x, mask, group_size)
    call.affine(weight, bias)
    call.statistics(mean, rstd)
    call.behind(residual, activation)
    y = call.output()
    call.packet.y = y.data_ptr()
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
    call = _Call(x, mask, group_size)
    call.affine(weight, bias)
    call.behind(residual, activation)
    y = call.output()
    call.packet.y = y.data_ptr()
    written = None if running is None else call.move(running)
    found, rstd = _measured(call, eps, apply=True)
    if written is not None:
        if call.plan.groups > 1:
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
) -> _Call:
    call = _Call(x, mask, group_size)
    call.affine(weight, bias)
    call.statistics(mean, rstd)
    call.behind(residual, activation)
    call.packet.dy = call.laid_out(dy)
    return call


def _with_sums(call: _Call) -> None:
    """Make room for the gradient's sums and coefficients."""
    packet, groups, parts = call.packet, call.plan.groups, call.plan.parts
    table = groups * call.plan.channels
    packet.part_count, packet.a, packet.b, packet.c, packet.sum_dy, packet.sum_dy_xhat = call.scratch(
        parts * groups, *[table] * 5
    )
    packet.part_dy, packet.part_dy_xhat = packet.sum_dy, packet.sum_dy_xhat
    if parts > 1:
        packet.part_dy, packet.part_dy_xhat = call.scratch(parts * table, parts * table)


def _with_parameters(call: _Call) -> tuple[Tensor, Tensor]:
    """Return tensors for dweight and dbias, `[C]`; the kernel fills them for a call with one group."""
    dweight, dbias = (torch.empty(call.plan.channels, dtype=call.real) for _ in range(2))
    if call.plan.groups == 1:
        call.packet.dweight, call.packet.dbias = dweight.data_ptr(), dbias.data_ptr()
    return dweight, dbias


def _with_outputs(call: _Call, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dx = call.output()
    dresidual = None if residual is None else call.output()
    call.packet.dx = dx.data_ptr()
    if dresidual is not None:
        call.packet.dresidual = dresidual.data_ptr()
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
    call.packet.sum_dy, call.packet.sum_dy_xhat = (t.data_ptr() for t in sums)
    if call.plan.parts == 1:
        call.packet.part_dy, call.packet.part_dy_xhat = call.packet.sum_dy, call.packet.sum_dy_xhat
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
    call.packet.a, call.packet.b, call.packet.c = map(call.wide, coefficients)
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
    call.packet.constant = given
    dweight, dbias = _with_parameters(call)
    dx, dresidual = _with_outputs(call, residual)
    call.run("backward", measure=True, apply=True)
    if call.plan.groups > 1:
        call.packet.dweight, call.packet.dbias = dweight.data_ptr(), dbias.data_ptr()
        call.close("backward")
    return (
        call.returned(dx, x),
        dweight,
        dbias,
        None if dresidual is None or residual is None else call.returned(dresidual, residual),
    )


def signs(x: Tensor, activation: str | None, group_size: int | None) -> Tensor | None:  # noqa: ARG001
    """See `interface.Engine.signs`: it keeps none."""
    return None


def given(running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """See `interface.Engine.given`."""
    real = running_mean.dtype
    if real not in _REALS or not (_is_plain(running_mean, real) and _is_plain(running_var, real)):
        return None
    packet, shape = Packet(), (1, running_mean.numel())
    mean, rstd = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
    packet.channels, packet.mean, packet.rstd, packet.eps = shape[1], mean.data_ptr(), rstd.data_ptr(), eps
    packet.running_mean, packet.running_var = running_mean.data_ptr(), running_var.data_ptr()
    run("take_running", real, True, packet, 0)
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
