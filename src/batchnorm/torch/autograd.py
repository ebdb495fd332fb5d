"""Runs eager calls as autograd Functions over an engine's kernels.

`_PlainBatchNorm` runs a layer's prepared plain call. `_BatchNorm` runs any other call that normalizes by its
batch or by running statistics, with one primitive of the engine each way. Where a policy chooses the
statistics, or ranks share moments, `_PolicyBatchNorm` runs the policy's step between moments and
normalization, and between the sums of the gradient and dx.

A Function saves x, the weight and the statistics per channel. It saves bias and residual only behind an
activation, whose derivative needs them, or one bit per value in their place, if the engine keeps that. It
never saves a running buffer, so updating one between two forwards is safe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.kernels.choose import engine, load
from batchnorm.kernels.interface import Engine, RunningState
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import Chosen

from . import composite, output_recompute
from .call import Call, Gradients, Normalized, cast
from .moments import check_finite, of_groups
from .policy_step import PolicyStep
from .tracing import is_batched_cotangent, is_transforming

if TYPE_CHECKING:
    from batchnorm.kernels.cpu.plain_call import PlainCall

_hooks = torch._C._autograd._top_saved_tensors_default_hooks

# How a call is launched: the engine; the running statistics that it moves; whether it normalizes by those of
# the call; memory for the activation's slopes; and a list to which it appends its statistics: as further
# outputs of the Function they would cost a quarter of the time of a whole small stock layer.
_Launch = tuple[Engine, RunningState | None, bool, Tensor | None, list[Tensor] | None]


class _BatchNorm(torch.autograd.Function):
    """(x, weight, bias, residual, call, launch) -> y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
        launch: _Launch,
    ) -> Tensor:
        engine, running, constant, activation_mask, found = launch
        if x is not call.x:  # torch has taken off the wrapper of a transform that is over
            call = call._replace(x=x, weight=weight, bias=bias, residual=residual)
        if constant:
            mean, var = call.running.mean, call.running.var
            y, statistics = engine.evaluate(call, mean, var, activation_mask)  # type: ignore[arg-type]
        else:
            y, statistics = engine.forward(call, running, activation_mask)
        if found is not None:
            found += statistics
        activation = call.activation
        if activation is None or activation_mask is not None:
            ctx.save_for_backward(x, weight, None, None, call.mask, activation_mask, *statistics)
        else:
            ctx.save_for_backward(x, weight, bias, residual, call.mask, None, *statistics)
        ctx.settings = (engine, activation, call.eps, call.group_size, constant)
        ctx.dtypes = (
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
            None if residual is None else residual.dtype,
        )
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Gradients:
        if hasattr(ctx, "recipe"):
            output_recompute.release(ctx)
        if dy is None:
            return (None,) * 6
        x, weight, bias, residual, mask, activation_mask, *statistics = ctx.saved_tensors
        engine, activation, eps, group_size, constant = ctx.settings
        call = Call(x, weight, bias, residual, mask, activation, eps, group_size)
        gradients = _gradients(ctx, engine, call, dy, tuple(statistics), constant, activation_mask)
        return *gradients, None, None


class _PlainBatchNorm(torch.autograd.Function):
    """(x, weight, bias, residual, plain, found) -> y: as `_BatchNorm`, of a prepared plain call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        plain: PlainCall,
        found: list[Tensor] | None,
    ) -> Tensor:
        y, statistics = plain.forward(x, residual)
        if plain.activation is None:
            ctx.save_for_backward(x, weight, None, None, statistics)
        else:
            ctx.save_for_backward(x, weight, bias, residual, statistics)
        ctx.plain = plain
        ctx.set_materialize_grads(False)
        if found is not None and statistics is not None:
            found.append(statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Gradients:
        if hasattr(ctx, "recipe"):
            output_recompute.release(ctx)
        if dy is None:
            return (None,) * 6
        x, weight, bias, residual, statistics = ctx.saved_tensors
        plain: PlainCall = ctx.plain
        is_saved = plain.is_as_saved(x, weight, bias, residual, statistics)
        if is_saved and not (torch.is_grad_enabled() or forward_ad._current_level >= 0):
            try:
                dx, dweight, dbias, dresidual = plain.backward(x, dy, weight, bias, residual, statistics)
            except RuntimeError:  # of a batch of cotangents, or within a transform, tensors show no address
                if not _is_differentiated(dy):
                    raise
            else:
                if plain.activation is None and ctx.needs_input_grad[3]:
                    dresidual = dy
                return dx, dweight, dbias, dresidual, None, None
        call = Call(x, weight, bias, residual, None, plain.activation, plain.eps)
        ctx.dtypes = (weight.dtype, weight.dtype, x.dtype)
        gradients = _gradients(ctx, load("cpu"), call, dy, (statistics,), not plain.training)
        return *gradients, None, None


class _PolicyBatchNorm(torch.autograd.Function):
    """(x, weight, bias, residual, call, engine, step, batch, chosen) -> y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
        engine: Engine,
        step: PolicyStep,
        batch: PooledMoments,
        chosen: Chosen,
    ) -> Tensor:
        if x is not call.x:  # torch has taken off the wrapper of a transform that is over
            call = call._replace(x=x, weight=weight, bias=bias, residual=residual)
        y = engine.normalize(call, chosen[:2])
        behind = (bias, residual) if call.activation is not None else (None, None)
        count = batch.count if isinstance(batch.count, Tensor) else None
        # Derivatives that are the same in all channels are numbers, which autograd does not save.
        saved = (value if isinstance(value, Tensor) else None for value in chosen)
        ctx.save_for_backward(x, weight, *behind, call.mask, count, batch.mean, batch.m2, *saved)
        ctx.numbers = tuple(None if isinstance(value, Tensor) else value for value in chosen)
        ctx.count = batch.count if count is None else None
        ctx.settings = (engine, call.activation, call.eps, call.group_size, step)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias, residual))
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Gradients:
        if hasattr(ctx, "recipe"):
            output_recompute.release(ctx)
        if dy is None:
            return (None,) * 9
        x, weight, bias, residual, mask, count, mean, m2, *found = ctx.saved_tensors
        engine, activation, eps, group_size, step = ctx.settings
        call = Call(x, weight, bias, residual, mask, activation, eps, group_size)
        batch = PooledMoments(ctx.count if count is None else count, mean, m2)
        chosen = Chosen(*(n if t is None else t for t, n in zip(found, ctx.numbers, strict=True)))
        if _is_differentiated(dy):
            gradients = composite.gradients(ctx, call, dy, step=step)
        else:
            gradients = step.gradients(engine, call, dy, batch, chosen, ctx.needs_input_grad[0])
        return *cast(ctx, gradients, dy, activation, mask), *(None,) * 5


def _is_differentiated(dy: Tensor) -> bool:
    """Whether a backward is itself differentiated or transformed."""
    return torch.is_grad_enabled() or is_transforming() or is_batched_cotangent(dy)


def _gradients(
    ctx: Any,
    engine: Engine,
    call: Call,
    dy: Tensor,
    statistics: tuple[Tensor, ...],
    constant: bool,
    activation_mask: Tensor | None = None,
) -> Gradients:
    """Return dx, dweight, dbias and dresidual of a call by its batch, or by `constant` statistics."""
    if not _is_differentiated(dy):
        found: Gradients = engine.backward(call, dy, statistics, constant, activation_mask)
        return cast(ctx, found, dy, call.activation, call.mask)
    if activation_mask is not None:
        dy = dy * _slopes(engine, call, statistics, activation_mask)
        call = call._replace(activation=None)
    given = _mean_and_rstd(engine, call, statistics) if constant else None
    return cast(ctx, composite.gradients(ctx, call, dy, given), dy, call.activation, call.mask)


def _mean_and_rstd(engine: Engine, call: Call, statistics: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    if len(statistics) == 2:
        return statistics[0], statistics[1]
    found, rstd = engine.unpack(statistics, call.x.shape[1])
    return found.mean, rstd


def _slopes(engine: Engine, call: Call, statistics: tuple[Tensor, ...], activation_mask: Tensor) -> Tensor:
    """Return the activation's slopes as a tensor, 0 or 1: the dresidual of a cotangent of ones."""
    with torch.no_grad():
        plain = call._replace(weight=None, bias=None, residual=None, mask=None)
        found = engine.backward(plain, torch.ones_like(call.x), statistics, True, activation_mask)[3]
        assert found is not None
        return found


def normalize_by_policy(call: Call, step: PolicyStep, *, strict: bool) -> Normalized:
    """Normalize by what the policy's step chooses; as `composite.normalize`."""
    chosen_engine = engine(call.x)
    batch, chosen = step.measured(chosen_engine, call, strict=strict)
    if not torch.is_grad_enabled():
        return Normalized(chosen_engine.normalize(call, chosen[:2]), batch)
    tensors = (call.x, call.weight, call.bias, call.residual)
    y = _PolicyBatchNorm.apply(*tensors, call, chosen_engine, step, batch, chosen)  # type: ignore[no-untyped-call]
    output_recompute.record(y, chosen_engine, call, chosen[:2])
    return Normalized(y, batch)


# torch's `Function.apply` also looks for a `setup_context`, and for wrappers that ended transforms have left.
# A plain call has neither, and the search takes 2 µs, as long as a small kernel.
_apply: Callable[..., Any] = super(torch.autograd.Function, _PlainBatchNorm).apply


def normalize_plain(plain: PlainCall, x: Tensor, residual: Tensor | None) -> Tensor:
    """Run a layer's prepared plain call."""
    if not torch.is_grad_enabled():
        return plain.forward(x, residual, keeps=False)[0]
    weight, bias, *_ = plain.tensors
    found: list[Tensor] | None = None if _hooks(False) is None else []  # `lean` is one of such hooks
    y: Tensor = _apply(x, weight, bias, residual, plain, found)
    if found is not None:
        call = Call(x, weight, bias, residual, None, plain.activation, plain.eps)
        output_recompute.record(y, load("cpu"), call, tuple(found))
    return y


def normalize(
    call: Call, running: RunningState | None = None, *, constant: bool = False, strict: bool = False
) -> Normalized:
    """Normalize by the moments of each group, or by running statistics; as `composite.normalize`.

    Args:
        call: the call.
        running: running statistics, which the engine moves if it can.
        constant: normalize by the call's running statistics.
        strict: raise NonFiniteError where moments are not finite; with `running` None.
    """
    chosen = engine(call.x)
    if running is not None and not chosen.moves(call.x, running):
        running = None
    if not torch.is_grad_enabled():
        if constant:
            return Normalized(chosen.evaluate(call, call.running.mean, call.running.var)[0], None)  # type: ignore[arg-type]
        y, statistics = chosen.forward(call, running)
        if running is not None:
            return Normalized(y, None, moved=True)
        return Normalized(y, _batch(chosen, call, statistics, strict=strict))
    activation_mask = None if call.residual is None else chosen.activation_mask(call)
    found: list[Tensor] = []
    launch = (chosen, running, constant, activation_mask, found)
    y = _BatchNorm.apply(call.x, call.weight, call.bias, call.residual, call, launch)  # type: ignore[no-untyped-call]
    statistics = tuple(found)
    batch = None if constant or running is not None else _batch(chosen, call, statistics, strict=strict)
    output_recompute.record(y, chosen, call, statistics, activation_mask is None)
    return Normalized(y, batch, moved=running is not None)


def _batch(engine: Engine, call: Call, statistics: tuple[Tensor, ...], *, strict: bool) -> PooledMoments:
    (count, mean, m2), _ = engine.unpack(statistics, call.x.shape[1])
    if call.mask is None and len(mean) == 1:  # the host knows the count without any operation on tensors
        batch = PooledMoments(float(call.x.shape[0] * math.prod(call.x.shape[2:])), mean, m2)
    else:
        batch = of_groups(count, mean, m2)
    if strict:
        check_finite(batch)
    return batch
