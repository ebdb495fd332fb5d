"""The Triton engine: see `interface.Engine`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from batchnorm.kernels.interface import Coefficients, Moments, RunningStatistics

from . import backward as gradient
from . import forward as outputs
from . import moments as measures
from . import running as moving
from . import sums
from .call import Call
from .launching import IS_INTERPRETED, launch
from .partition import partition, power

__all__ = [
    "IS_INTERPRETED",
    "activation_mask",
    "backward",
    "backward_apply",
    "backward_reduce",
    "forward",
    "given",
    "moments",
    "moves",
    "normalize",
]

_REALS = (torch.float32, torch.float64)  # dtypes that running statistics have here

# Activations whose slope is 0 or 1.
_OPEN = frozenset({"relu", "relu6"})


def moments(x: Tensor, *, mask: Tensor | None = None, group_size: int | None = None) -> Moments:
    """See `interface.Engine.moments`."""
    return _measured(Call(x, mask=mask, group_size=group_size), 0.0, {})[0]


def _measured(call: Call, eps: float, running: dict[str, Any]) -> tuple[Moments, Tensor]:
    """Return the moments, taken in parts, and rstd."""
    partition = call.partition
    found = _room(call)
    parts = dict(zip(("part_count", "part_mean", "part_m2"), call.tables(3, partition.parts), strict=True))
    counts = {"groups": partition.groups, "parts": partition.parts, "tiles": partition.part_tiles}
    call.run(measures.measure_parts, partition.parts, **parts, **counts)
    call.merge(measures.merge_moments, EPS=eps, **parts, **found, **(_NOTHING | running))
    return _moments(found)


def _room(call: Call) -> dict[str, Tensor]:
    mean, m2, rstd = call.tables(3)
    count = torch.empty(call.partition.groups, dtype=torch.float64, device=call.x.device)
    return {"count": count, "mean": mean, "m2": m2, "rstd": rstd}


def _moments(found: dict[str, Tensor]) -> tuple[Moments, Tensor]:
    return Moments(found["count"], found["mean"], found["m2"]), found["rstd"]


_NOTHING = {"running_mean": None, "running_var": None, "batches": None, "momentum": 0.0}


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
    activation_mask: Tensor | None = None,
) -> Tensor:
    """See `interface.Engine.normalize`."""
    call = Call(
        x,
        weight,
        bias,
        residual=residual,
        activation=activation,
        mask=mask,
        group_size=group_size,
        activation_mask=activation_mask,
    )
    return call.returned(_normalized(call, *_wide(mean, rstd)), x)


def _wide(*statistics: Tensor) -> tuple[Tensor, ...]:
    return tuple(values.to(torch.float64).contiguous() for values in statistics)


def _normalized(call: Call, mean: Tensor, rstd: Tensor) -> Tensor:
    y, steps = torch.empty_like(call.x), call.steps()
    call.run(outputs.normalize, steps["parts"], y=y, mean=mean, rstd=rstd, **steps, **call.affine)
    return y


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
    activation_mask: Tensor | None = None,
) -> tuple[Tensor, Moments, Tensor]:
    """See `interface.Engine.forward`."""
    call = Call(
        x,
        weight,
        bias,
        residual=residual,
        activation=activation,
        mask=mask,
        group_size=group_size,
        activation_mask=activation_mask,
    )
    moved = _moved(running)
    # A batch of one group that is never skipped moves them along the way.
    is_apart = running is not None and (call.partition.groups > 1 or running.skipped is not None)
    within = {} if is_apart else moved
    if call.partition.is_whole:
        y, room = torch.empty_like(call.x), _room(call)
        call.run(
            outputs.forward_whole, 1, y=y, EPS=eps, **room, **call.whole, **call.affine, **(_NOTHING | within)
        )
        found, rstd = _moments(room)
    else:
        found, rstd = _measured(call, eps, within)
        y = _normalized(call, found.mean, rstd)
    if running is not None:
        if is_apart:
            call.close(
                moving.move_running,
                **found._asdict(),
                **moved,
                skipped=running.skipped,
                size=found.mean.numel(),
                SEQUENTIAL=running.sequential,
            )
        increment_version([t for t in (*running[:3], running.skipped) if t is not None])
    return call.returned(y, x), found, rstd


def _moved(running: RunningStatistics | None) -> dict[str, Any]:
    if running is None:
        return {}
    mean, var, batches, momentum, *_ = running
    return {"running_mean": mean, "running_var": var, "batches": batches, "momentum": momentum}


def _sums(call: Call, dy: Tensor, mean: Tensor, rstd: Tensor) -> dict[str, Tensor]:
    """Return the gradient's sums, of parts."""
    partition = call.partition
    parts = dict(zip(("part_count", "part_dy", "part_dy_xhat"), call.tables(3, partition.parts), strict=True))
    counts = {
        "groups": partition.groups,
        "parts": partition.parts,
        "tiles": partition.part_tiles,
        "span": partition.tiles,
    }
    given = {"dy": dy, "mean": mean, "rstd": rstd}
    call.run(sums.sum_parts, partition.parts, **parts, **counts, **given, **call.affine)
    return parts


def _applied(
    call: Call, dy: Tensor, mean: Tensor, rstd: Tensor, slopes: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Return dx and dresidual, in the layout of x."""
    steps, out = call.steps(), _outputs(call)
    given = {"dy": dy, "mean": mean, "rstd": rstd}
    call.run(gradient.differentiate, steps["parts"], **steps, **given, **slopes, **out, **call.affine)
    return out["dx"], out["dresidual"]


def _outputs(call: Call) -> dict[str, Any]:
    dresidual = None if call.residual is None and call.activation_mask is None else torch.empty_like(call.x)
    return {"dx": torch.empty_like(call.x), "dresidual": dresidual}


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
    call = Call(x, weight, bias, residual=residual, activation=activation, mask=mask, group_size=group_size)
    mean, rstd = _wide(mean, rstd)
    parts = _sums(call, call.laid_out(dy), mean, rstd)
    sum_dy, sum_dy_xhat = call.tables(2)
    nothing = dict.fromkeys(("a", "b", "c", "dweight", "dbias"))
    call.merge(
        sums.merge_sums,
        mean=mean,
        rstd=rstd,
        weight=call.weight,
        sum_dy=sum_dy,
        sum_dy_xhat=sum_dy_xhat,
        GIVEN=False,
        REAL=call.REAL,
        **parts,
        **nothing,
    )
    return sum_dy, sum_dy_xhat


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
    call = Call(x, weight, bias, residual=residual, activation=activation, mask=mask, group_size=group_size)
    slopes = dict(zip("abc", _wide(*coefficients), strict=True))
    mean, rstd = _wide(mean, rstd)
    dx, dresidual = _applied(call, call.laid_out(dy), mean, rstd, slopes)
    return call.returned(dx, x), _returned(call, dresidual, residual)


def _returned(call: Call, dresidual: Tensor | None, residual: Tensor | None) -> Tensor | None:
    """Return dresidual as the residual is laid out; as x, where activation_mask stand for it."""
    if dresidual is None or residual is None:
        return dresidual
    return call.returned(dresidual, residual)


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
    activation_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `interface.Engine.backward`."""
    call = Call(
        x,
        weight,
        bias,
        residual=residual,
        activation=activation,
        mask=mask,
        group_size=group_size,
        activation_mask=activation_mask,
    )
    dy = call.laid_out(dy)
    mean, rstd = _wide(mean, rstd)
    dweight, dbias = (
        torch.empty(call.partition.channels, dtype=call.real, device=x.device) for _ in range(2)
    )
    is_one = call.partition.groups == 1
    parameters = {"dweight": dweight if is_one else None, "dbias": dbias if is_one else None}
    names = ("sum_dy", "sum_dy_xhat")
    totals: dict[str, Any] = dict.fromkeys(names) if is_one else dict(zip(names, call.tables(2), strict=True))
    if call.partition.is_whole:
        out = _outputs(call)
        statistics = {"dy": dy, "mean": mean, "rstd": rstd, "GIVEN": given}
        call.run(
            gradient.backward_whole,
            1,
            **statistics,
            **out,
            **parameters,
            **totals,
            **call.whole,
            **call.affine,
        )
        dx, dresidual = out["dx"], out["dresidual"]
    else:
        parts = _sums(call, dy, mean, rstd)
        slopes = dict(zip("abc", call.tables(3), strict=True))
        call.merge(
            sums.merge_sums,
            mean=mean,
            rstd=rstd,
            weight=call.weight,
            GIVEN=given,
            REAL=call.REAL,
            **parts,
            **totals,
            **slopes,
            **parameters,
        )
        dx, dresidual = _applied(call, dy, mean, rstd, slopes)
    if not is_one:
        call.close(sums.add_groups, **totals, dweight=dweight, dbias=dbias)
    return call.returned(dx, x), dweight, dbias, _returned(call, dresidual, residual)


def activation_mask(x: Tensor, activation: str | None, group_size: int | None) -> Tensor | None:
    """See `interface.Engine.activation_mask`."""
    if activation not in _OPEN:
        return None
    found = partition(x.shape, x.stride(), group_size)
    tiles, values = found.groups * found.channel_tiles * found.tiles, found.outer * found.inner
    if values < 8:
        return None
    return torch.empty(tiles * values // 8, dtype=torch.uint8, device=x.device)


def given(running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """See `interface.Engine.given`."""
    real = running_mean.dtype
    if real not in _REALS or not all(_is_plain(t, real, running_mean) for t in (running_mean, running_var)):
        return None
    channels = running_mean.numel()
    mean, rstd = torch.empty(2, 1, channels, dtype=torch.float64, device=running_mean.device).unbind()
    arguments = {"running_mean": running_mean, "running_var": running_var, "mean": mean, "rstd": rstd}
    block = min(1024, power(channels))
    more = {"eps": eps, "channels": channels, "CHANNELS": block}
    launch(moving.take_running, math.ceil(channels / block), 4, running_mean, arguments | more)
    return mean, rstd


def moves(x: Tensor, running: RunningStatistics) -> bool:
    """See `interface.Engine.moves`."""
    mean, var, batches, _, skipped, _ = running
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    wanted = ((mean, real), (var, real), (batches, torch.int64), (skipped, torch.int64))
    return all(values is None or _is_plain(values, dtype, x) for values, dtype in wanted)


def _is_plain(values: Tensor, dtype: torch.dtype, like: Tensor) -> bool:
    """Whether a kernel may read and write a tensor."""
    return (
        (type(values) is Tensor or type(values) is torch.nn.Parameter)
        and values.dtype == dtype
        and values.device == like.device
        and values.is_contiguous()
        and not values.requires_grad
        and not values.is_inference()
    )
