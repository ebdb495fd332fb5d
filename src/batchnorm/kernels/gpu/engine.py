"""Computes the primitives of `interface.Engine` by kernels in Triton."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from batchnorm.kernels.eager import constants, unpack
from batchnorm.kernels.interface import Call, Coefficients, Moments, RunningState, Statistics
from batchnorm.kernels.layout import shows_values

from . import backward as gradient
from . import forward as outputs
from . import moments as measures
from . import running as moving
from . import sums
from .launcher import IS_INTERPRETED, launch
from .launches import Launches
from .partition import partition, power

__all__ = [
    "IS_INTERPRETED",
    "activation_mask",
    "backward",
    "backward_apply",
    "backward_reduce",
    "evaluate",
    "forward",
    "moments",
    "moves",
    "normalize",
    "unpack",
]

_NOTHING = RunningState(momentum=0.0)
_REALS = (torch.float32, torch.float64)  # dtypes that running statistics have here

# Activations whose slope is 0 or 1.
_OPEN = frozenset({"relu", "relu6"})


def moments(call: Call) -> Moments:
    """See `interface.Engine.moments`."""
    mean, _, count, m2 = _measured(Launches(call), 0.0, _NOTHING)
    return Moments(count, mean, m2)


def _measured(launches: Launches, eps: float, running: RunningState) -> Statistics:
    """Returns the moments, taken in parts, and rstd; moves running statistics."""
    partition = launches.partition
    found = _tables(launches)
    tables = launches.tables(3, partition.parts)
    parts = dict(zip(("part_count", "part_mean", "part_m2"), tables, strict=True))
    counts = {"groups": partition.groups, "parts": partition.parts, "tiles": partition.part_tiles}
    launches.run(measures.measure_parts, partition.parts, **parts, **counts)
    launches.merge(measures.merge_moments, EPS=eps, **parts, **found, **_moved(running))
    return _statistics(found)


def _tables(launches: Launches) -> dict[str, Tensor]:
    mean, m2, rstd = launches.tables(3)
    count = torch.empty(launches.partition.groups, dtype=torch.float64, device=launches.x.device)
    return {"count": count, "mean": mean, "m2": m2, "rstd": rstd}


def _statistics(found: dict[str, Tensor]) -> Statistics:
    return found["mean"], found["rstd"], found["count"], found["m2"]


def normalize(call: Call, statistics: Statistics, activation_mask: Tensor | None = None) -> Tensor:
    """See `interface.Engine.normalize`."""
    launches = Launches(call, activation_mask)
    return launches.returned(_normalized(launches, *_wide(*statistics[:2])), call.x)


def _wide(*statistics: Tensor) -> tuple[Tensor, ...]:
    return tuple(values.to(torch.float64).contiguous() for values in statistics)


def _normalized(launches: Launches, mean: Tensor, rstd: Tensor) -> Tensor:
    y, steps = torch.empty_like(launches.x), launches.steps()
    launches.run(outputs.normalize, steps["parts"], y=y, mean=mean, rstd=rstd, **steps, **launches.affine)
    return y


def evaluate(
    call: Call,
    mean: Tensor,
    var: Tensor,
    activation_mask: Tensor | None = None,
    *,
    keeps: bool = True,  # noqa: ARG001
) -> tuple[Tensor, Statistics]:
    """See `interface.Engine.evaluate`."""
    statistics = _constants(mean, var, call.eps)
    return normalize(call, statistics, activation_mask), statistics


def _constants(mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns mean and rstd = 1 / sqrt(var + eps), `[1, C]`, copied."""
    real = mean.dtype
    if real not in _REALS or not all(_is_plain(t, real, mean) for t in (mean, var)):
        return constants(mean, var, eps)
    channels = mean.numel()
    found, rstd = torch.empty(2, 1, channels, dtype=torch.float64, device=mean.device).unbind()
    arguments = {"running_mean": mean, "running_var": var, "mean": found, "rstd": rstd}
    block = min(1024, power(channels))
    more = {"eps": eps, "channels": channels, "CHANNELS": block}
    launch(moving.take_running, math.ceil(channels / block), 4, mean, arguments | more)
    return found, rstd


def forward(
    call: Call, running: RunningState | None = None, activation_mask: Tensor | None = None
) -> tuple[Tensor, Statistics]:
    """See `interface.Engine.forward`."""
    launches = Launches(call, activation_mask)
    # The statistics of one group that is never skipped move in the launch that finds its moments.
    is_apart = running is not None and (launches.partition.groups > 1 or running.skipped is not None)
    within = _NOTHING if is_apart or running is None else running
    if launches.partition.is_whole:
        y, tables = torch.empty_like(launches.x), _tables(launches)
        arguments = {**tables, **launches.whole, **launches.affine, **_moved(within)}
        launches.run(outputs.forward_whole, 1, y=y, EPS=call.eps, **arguments)
        statistics = _statistics(tables)
    else:
        statistics = _measured(launches, call.eps, within)
        y = _normalized(launches, *statistics[:2])
    if running is not None:
        if is_apart:
            mean, _, count, m2 = statistics
            launches.close(
                moving.move_running,
                count=count,
                mean=mean,
                m2=m2,
                **_moved(running),
                skipped=running.skipped,
                size=mean.numel(),
                SEQUENTIAL=running.sequential,
            )
        written = (running.mean, running.var, running.batches, running.skipped)
        increment_version([t for t in written if t is not None])
    return launches.returned(y, call.x), statistics


def _moved(running: RunningState) -> dict[str, Any]:
    """Returns the arguments by which a kernel moves running statistics."""
    mean, var, batches, momentum, *_ = running
    return {"running_mean": mean, "running_var": var, "batches": batches, "momentum": momentum}


def _sums(launches: Launches, dy: Tensor, mean: Tensor, rstd: Tensor) -> dict[str, Tensor]:
    """Returns the gradient's sums, of parts."""
    partition = launches.partition
    parts = dict(
        zip(("part_count", "part_dy", "part_dy_xhat"), launches.tables(3, partition.parts), strict=True)
    )
    counts = {
        "groups": partition.groups,
        "parts": partition.parts,
        "tiles": partition.part_tiles,
        "span": partition.tiles,
    }
    given = {"dy": dy, "mean": mean, "rstd": rstd}
    launches.run(sums.sum_parts, partition.parts, **parts, **counts, **given, **launches.affine)
    return parts


def _applied(
    launches: Launches, dy: Tensor, mean: Tensor, rstd: Tensor, slopes: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Returns dx and dresidual, in the layout of x."""
    steps, out = launches.steps(), _outputs(launches)
    given = {"dy": dy, "mean": mean, "rstd": rstd}
    launches.run(gradient.differentiate, steps["parts"], **steps, **given, **slopes, **out, **launches.affine)
    return out["dx"], out["dresidual"]


def _outputs(launches: Launches) -> dict[str, Any]:
    dresidual = (
        None
        if launches.residual is None and launches.activation_mask is None
        else torch.empty_like(launches.x)
    )
    return {"dx": torch.empty_like(launches.x), "dresidual": dresidual}


def backward_reduce(call: Call, dy: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """See `interface.Engine.backward_reduce`."""
    launches = Launches(call)
    mean, rstd = _wide(*statistics[:2])
    parts = _sums(launches, launches.laid_out(dy), mean, rstd)
    sum_dy, sum_dy_xhat = launches.tables(2)
    nothing = dict.fromkeys(("a", "b", "c", "dweight", "dbias"))
    launches.merge(
        sums.merge_sums,
        mean=mean,
        rstd=rstd,
        weight=launches.weight,
        sum_dy=sum_dy,
        sum_dy_xhat=sum_dy_xhat,
        GIVEN=False,
        REAL=launches.REAL,
        **parts,
        **nothing,
    )
    return sum_dy, sum_dy_xhat


def backward_apply(
    call: Call, dy: Tensor, statistics: Statistics, coefficients: Coefficients
) -> tuple[Tensor, Tensor | None]:
    """See `interface.Engine.backward_apply`."""
    launches = Launches(call)
    slopes = dict(zip("abc", _wide(*coefficients), strict=True))
    mean, rstd = _wide(*statistics[:2])
    dx, dresidual = _applied(launches, launches.laid_out(dy), mean, rstd, slopes)
    return launches.returned(dx, call.x), _returned(launches, dresidual, call.residual)


def _returned(launches: Launches, dresidual: Tensor | None, residual: Tensor | None) -> Tensor | None:
    """Returns dresidual in the layout of the residual, or of x where an activation mask replaces that."""
    if dresidual is None or residual is None:
        return dresidual
    return launches.returned(dresidual, residual)


def backward(
    call: Call,
    dy: Tensor,
    statistics: Statistics,
    constant: bool,
    activation_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `interface.Engine.backward`."""
    launches = Launches(call, activation_mask)
    dy = launches.laid_out(dy)
    mean, rstd = _wide(*statistics[:2])
    channels, is_one = launches.partition.channels, launches.partition.groups == 1
    dweight, dbias = (torch.empty(channels, dtype=launches.real, device=call.x.device) for _ in range(2))
    parameters = {"dweight": dweight if is_one else None, "dbias": dbias if is_one else None}
    names = ("sum_dy", "sum_dy_xhat")
    totals: dict[str, Any] = (
        dict.fromkeys(names) if is_one else dict(zip(names, launches.tables(2), strict=True))
    )
    given = {"mean": mean, "rstd": rstd, "GIVEN": constant}
    if launches.partition.is_whole:
        out = _outputs(launches)
        arguments = {**given, **out, **parameters, **totals, **launches.whole, **launches.affine}
        launches.run(gradient.backward_whole, 1, dy=dy, **arguments)
        dx, dresidual = out["dx"], out["dresidual"]
    else:
        parts = _sums(launches, dy, mean, rstd)
        slopes = dict(zip("abc", launches.tables(3), strict=True))
        arguments = {**given, **parts, **totals, **slopes, **parameters}
        launches.merge(sums.merge_sums, weight=launches.weight, REAL=launches.REAL, **arguments)
        dx, dresidual = _applied(launches, dy, mean, rstd, slopes)
    if not is_one:
        launches.close(sums.add_groups, **totals, dweight=dweight, dbias=dbias)
    return launches.returned(dx, call.x), dweight, dbias, _returned(launches, dresidual, call.residual)


def activation_mask(call: Call) -> Tensor | None:
    """See `interface.Engine.activation_mask`."""
    if call.activation not in _OPEN:
        return None
    found = partition(call.x.shape, call.x.stride(), call.group_size)
    tiles, values = found.groups * found.channel_tiles * found.tiles, found.outer * found.inner
    if values < 8:
        return None
    return torch.empty(tiles * values // 8, dtype=torch.uint8, device=call.x.device)


def moves(x: Tensor, running: RunningState) -> bool:
    """See `interface.Engine.moves`."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    wanted = (
        (running.mean, real),
        (running.var, real),
        (running.batches, torch.int64),
        (running.skipped, torch.int64),
    )
    is_number = isinstance(running.momentum, float | int)
    return is_number and all(v is None or _is_plain(v, dtype, x) for v, dtype in wanted)


def _is_plain(values: Tensor, dtype: torch.dtype, like: Tensor) -> bool:
    """Returns whether a kernel may read and write a tensor."""
    return (
        (type(values) is Tensor or type(values) is torch.nn.Parameter)
        and values.dtype == dtype
        and values.device == like.device
        and values.is_contiguous()
        and not values.requires_grad
        and not values.is_inference()
        and shows_values(values)
    )
