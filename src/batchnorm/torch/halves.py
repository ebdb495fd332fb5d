"""The two halves of a call, with a policy between them: moments, then normalization; sums, then gradient.

`operators.py` has the calls that need nothing between, which are one launch each way. Kept for the backward:
x, and per channel what was chosen and the moments that it followed; the residual only behind an activation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.kernels.choose import engine
from batchnorm.kernels.interface import Engine
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import Chosen, gradient_coefficients

from . import composite, output_recipes
from .plan import Plan
from .policy_step import array, shows_its_memory, tensor
from .running_stats import check_finite, of_groups
from .tracing import is_batched_cotangent, is_transforming


class _Chosen(torch.autograd.Function):
    """(engine, x, weight, bias, residual, plan, batch, chosen) -> y."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        plan: Plan,
        batch: PooledMoments,
        chosen: Chosen,
    ) -> Tensor:
        y = engine.normalize(x, chosen.mean, chosen.rstd, weight, bias, residual=residual, **plan.options)
        behind = (bias, residual) if plan.activation is not None else (None, None)
        count = batch.count if isinstance(batch.count, Tensor) else None
        # What follows the batch in a constant way is a number.
        saved = (value if isinstance(value, Tensor) else None for value in chosen)
        ctx.save_for_backward(x, weight, *behind, count, batch.mean, batch.m2, *saved, plan.mask)
        ctx.numbers = tuple(None if isinstance(value, Tensor) else value for value in chosen)
        ctx.count = batch.count if count is None else None
        ctx.settings = (engine, plan._replace(mask=None))
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias, residual))
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        output_recipes.release(ctx)
        if dy is None:
            return (None,) * 8
        x, weight, bias, residual, count, mean, m2, *found, mask = ctx.saved_tensors
        engine, plan = ctx.settings
        plan = plan._replace(mask=mask)
        batch = PooledMoments(ctx.count if count is None else count, mean, m2)
        chosen = Chosen(*(n if t is None else t for t, n in zip(found, ctx.numbers, strict=True)))
        if torch.is_grad_enabled() or is_transforming() or is_batched_cotangent(dy):
            gradients = composite.gradients(ctx, x, dy, weight, bias, residual, plan)
        else:
            gradients = gradients_of(
                engine, x, dy, weight, bias, residual, plan, batch, chosen, ctx.needs_input_grad[1]
            )
        dx, dweight, dbias, dresidual = gradients
        if plan.activation is None:
            dresidual = dy if mask is None or not ctx.needs_input_grad[4] else composite.cleared(dy, mask)
        needed, dtypes = ctx.needs_input_grad, ctx.dtypes
        return (
            None,
            dx if needed[1] else None,
            dweight.to(dtypes[0]) if needed[2] and dweight is not None else None,
            dbias.to(dtypes[1]) if needed[3] and dbias is not None else None,
            dresidual.to(dtypes[2]) if needed[4] and dresidual is not None else None,
            *(None,) * 3,
        )


def gradients_of(
    engine: Engine,
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
    batch: PooledMoments,
    chosen: Chosen,
    needs_dx: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Return dx, dweight, dbias and dresidual; the parameters' are sums over this rank's values alone."""
    tensors = (x, dy, chosen.mean, chosen.rstd)
    options = {"residual": residual, **plan.options}
    sum_dy, sum_dy_xhat = engine.backward_reduce(*tensors, weight, bias, **options)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dweight, dbias = sum_dy_xhat.sum(0).to(dtype), sum_dy.sum(0).to(dtype)
    if needs_dx:
        assert plan.choice is not None
        sum_dy, sum_dy_xhat = plan.choice.add(sum_dy, sum_dy_xhat)
    elif plan.activation is None or residual is None:
        return None, dweight, dbias, None
    coefficients = _coefficients(weight, chosen, batch, sum_dy, sum_dy_xhat)
    dx, dresidual = engine.backward_apply(*tensors, coefficients, weight, bias, **options)
    return dx, dweight, dbias, dresidual


def _coefficients(
    weight: Tensor | None, chosen: Chosen, batch: PooledMoments, sum_dy: Tensor, sum_dy_xhat: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # A copy: memory that an array has shown is not resizable any more, and FSDP resizes its parameters'.
    wide = 1.0 if weight is None else weight.detach().to(sum_dy.dtype, copy=True)
    if not shows_its_memory(sum_dy):
        return gradient_coefficients(wide, chosen, batch, sum_dy, sum_dy_xhat)
    with np.errstate(all="ignore"):
        found = gradient_coefficients(
            array(wide),
            Chosen(*map(array, chosen)),
            PooledMoments(*map(array, batch)),
            array(sum_dy),
            array(sum_dy_xhat),
        )
    a, b, c = map(tensor, found)
    return a, b, c


def measured(engine: Engine, x: Tensor, plan: Plan, *, strict: bool) -> tuple[PooledMoments, Chosen]:
    """Return the moments of all who share, and what the policy chooses by them.

    Args:
        strict: raise NonFiniteError where moments are not finite.
    """
    assert plan.choice is not None
    with torch.no_grad():
        found = engine.moments(x.detach(), mask=plan.mask, group_size=plan.group_size)
        batch, samples = plan.choice.share(of_groups(found.count, found.mean, found.m2))
        if strict:
            check_finite(batch.mean, batch.m2)
        return batch, plan.choice.recalled(batch).choose(batch, samples, plain=True)


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
    *,
    strict: bool,
) -> composite.Normalized:
    """Normalize eagerly by what the plan's choice takes, as `composite.normalize`."""
    chosen_engine = engine(x)
    batch, chosen = measured(chosen_engine, x, plan, strict=strict)
    if torch.is_grad_enabled():
        y = _Chosen.apply(chosen_engine, x, weight, bias, residual, plan, batch, chosen)  # type: ignore[no-untyped-call]
        output_recipes.record(y, chosen_engine, x, residual, chosen[:2], (weight, bias), plan)
    else:
        y = chosen_engine.normalize(
            x, chosen.mean, chosen.rstd, weight, bias, residual=residual, **plan.options
        )
    return composite.Normalized(y, batch)
