"""The forward and its gradient over the kernels, as an autograd Function: the path of most eager calls.

Kept for the backward: x, and per channel mean and rstd; the residual only behind an activation, whose
derivative needs it, or one bit per value in its place, if the engine keeps that. No running buffer is ever
kept, so updating one between two forwards is safe.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.choose import engine
from batchnorm.kernels.interface import Engine, RunningStatistics
from batchnorm.statistics.moments import PooledMoments

from . import composite, output_recipes
from .plan import Plan
from .running_stats import check_finite, of_groups
from .tracing import is_batched_cotangent, is_transforming


class _BatchNorm(torch.autograd.Function):
    """(engine, x, weight, bias, residual, plan, running, found, activation_mask) -> y; see `apply`.

    The batch's count, mean, m2 and rstd are appended to the list `found`: as further outputs they would cost
    a quarter of the time of a whole small stock layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        plan: Plan,
        running: RunningStatistics | None,
        found: list[Tensor],
        activation_mask: Tensor | None,
    ) -> Tensor:
        eps, activation, mask, group_size, given, _ = plan
        kept: dict[str, Any] = {} if activation_mask is None else {"activation_mask": activation_mask}
        if given is None:
            y, moments, rstd = engine.forward(
                x,
                eps,
                weight,
                bias,
                residual=residual,
                activation=activation,
                mask=mask,
                group_size=group_size,
                running=running,
                **kept,
            )
            mean = moments.mean
            found += (*moments, rstd)
        else:
            mean, rstd = given
            y = engine.normalize(
                x, mean, rstd, weight, bias, residual=residual, activation=activation, mask=mask, **kept
            )
        behind = (bias, residual) if activation is not None and activation_mask is None else (None, None)
        ctx.save_for_backward(x, weight, *behind, mean, rstd, mask, activation_mask)
        ctx.settings = (engine, eps, activation, group_size, given is not None)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias, residual))
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        output_recipes.release(ctx)
        if dy is None:
            return (None,) * 9
        x, weight, bias, residual, mean, rstd, mask, activation_mask = ctx.saved_tensors
        engine, eps, activation, group_size, given = ctx.settings
        kept: dict[str, Any] = {} if activation_mask is None else {"activation_mask": activation_mask}
        if torch.is_grad_enabled() or is_transforming() or is_batched_cotangent(dy):
            if activation_mask is not None:
                dy, activation = (
                    dy * _slopes(engine, x, mean, rstd, activation, group_size, activation_mask),
                    None,
                )
            plan = Plan(eps, activation, mask, group_size, (mean, rstd) if given else None)
            gradients = composite.gradients(ctx, x, dy, weight, bias, residual, plan)
        else:
            gradients = engine.backward(
                x,
                dy,
                mean,
                rstd,
                given,
                weight,
                bias,
                residual=residual,
                activation=activation,
                mask=mask,
                group_size=group_size,
                **kept,
            )
        dx, dweight, dbias, dresidual = gradients
        needed, dtypes = ctx.needs_input_grad, ctx.dtypes
        if activation is None and needed[4]:
            dresidual = composite.cleared(dy, mask)
        return (
            None,
            dx if needed[1] else None,
            dweight.to(dtypes[0]) if needed[2] and dweight is not None else None,
            dbias.to(dtypes[1]) if needed[3] and dbias is not None else None,
            dresidual.to(dtypes[2]) if needed[4] and dresidual is not None else None,
            *(None,) * 4,
        )


def _slopes(
    engine: Engine,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
    group_size: int | None,
    activation_mask: Tensor,
) -> Tensor:
    """Return the activation's slopes as a tensor, 0 or 1: what a cotangent of ones is behind it."""
    with torch.no_grad():
        options: dict[str, Any] = {
            "activation": activation,
            "group_size": group_size,
            "activation_mask": activation_mask,
        }
        found = engine.backward(x, torch.ones_like(x), mean, rstd, True, **options)[3]
        assert found is not None
        return found


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
    running: RunningStatistics | None = None,
    *,
    strict: bool = False,
) -> composite.Normalized:
    """Normalize eagerly, as `composite.normalize`; differentiable where an input requires a gradient.

    Args:
        plan: without a choice: by the moments of each group, or by given statistics.
        running: running statistics, which the engine moves if it can.
        strict: raise NonFiniteError where moments are not finite; with `running` None.
    """
    chosen = engine(x)
    if running is not None and not chosen.moves(x, running):
        running = None
    moved = running is not None
    if not torch.is_grad_enabled():
        if plan.given is not None:
            y = chosen.normalize(x, *plan.given, weight, bias, residual=residual, **plan.options)
            return composite.Normalized(y, None)
        y, moments, _ = chosen.forward(
            x, plan.eps, weight, bias, residual=residual, running=running, **plan.options
        )
        return composite.Normalized(y, _batch(x, plan, *moments, strict=strict), moved)
    found: list[Tensor] = []
    activation_mask = (
        None if residual is None else chosen.activation_mask(x, plan.activation, plan.group_size)
    )
    y = _BatchNorm.apply(chosen, x, weight, bias, residual, plan, running, found, activation_mask)  # type: ignore[no-untyped-call]
    if plan.given is not None:
        output_recipes.record(
            y, chosen, x, residual, plan.given, (weight, bias), plan, activation_mask is None
        )
        return composite.Normalized(y, None)
    count, mean, m2, rstd = found
    batch = _batch(x, plan, count, mean, m2, strict=strict)
    output_recipes.record(y, chosen, x, residual, (mean, rstd), (weight, bias), plan, activation_mask is None)
    return composite.Normalized(y, batch, moved)


def _batch(x: Tensor, plan: Plan, count: Tensor, mean: Tensor, m2: Tensor, *, strict: bool) -> PooledMoments:
    if strict:
        check_finite(mean, m2)
    if plan.mask is None and len(mean) == 1:  # known here: no operation on a tensor need find it out
        return PooledMoments(float(x.shape[0] * math.prod(x.shape[2:])), mean, m2)
    return of_groups(count, mean, m2)
