"""The forward and its gradient as `torch.library` operators: what `torch.compile` sees, not the kernels.

The compiler takes each as one opaque call, so a compiled layer computes what an eager one does. Kernels that
it can see are in `compiled_kernels.py`. Eager calls do not come here: a pair of custom operators costs more
than a whole small stock layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.choose import engine
from batchnorm.kernels.interface import Engine, wide_dtype
from batchnorm.statistics.moments import PooledMoments

from . import compiled_choice
from .compiled_groups import groups_of
from .composite import Normalized, cleared
from .plan import Plan
from .running_stats import check_finite, of_groups


@torch.library.custom_op("batchnorm::normalize", mutates_args=())
def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    given_mean: Tensor | None,
    given_rstd: Tensor | None,
    activation: str | None,
    eps: float,
    group_size: int | None,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (given_mean, given_rstd)
    found = normalized(engine(x), x, weight, bias, residual, mask, *given, activation, eps, group_size)
    if strict and given_mean is None:
        check_finite(found[2], found[3])
    return found


def normalized(
    engine: Engine,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    given_mean: Tensor | None,
    given_rstd: Tensor | None,
    activation: str | None,
    eps: float,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, count, mean, m2 and rstd; of given statistics, 0 for count and m2."""
    options: dict[str, Any] = {"residual": residual, "activation": activation, "mask": mask}
    if given_mean is None or given_rstd is None:
        y, found, rstd = engine.forward(x, eps, weight, bias, group_size=group_size, **options)
        return y, *found, rstd
    y = engine.normalize(x, given_mean, given_rstd, weight, bias, **options)
    count = given_mean.new_zeros(given_mean.shape[0])
    return y, count, given_mean.clone(), torch.zeros_like(given_mean), given_rstd.clone()


@_normalize.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    residual: Tensor | None,  # noqa: ARG001
    mask: Tensor | None,  # noqa: ARG001
    given_mean: Tensor | None,  # noqa: ARG001
    given_rstd: Tensor | None,  # noqa: ARG001
    activation: str | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    group_size: int | None,
    strict: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups = groups_of(x, group_size)
    wide = wide_dtype(x.device)
    mean, m2, rstd = (x.new_empty(groups, x.shape[1], dtype=wide) for _ in range(3))
    return torch.empty_like(x), x.new_empty(groups, dtype=wide), mean, m2, rstd


@torch.library.custom_op("batchnorm::normalize_backward", mutates_args=())
def _normalize_backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str | None,
    given: bool,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return gradients(
        engine(x), x, dy, weight, bias, residual, mask, mean, rstd, activation, given, group_size
    )


def gradients(
    engine: Engine,
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str | None,
    given: bool,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias and dresidual, which is empty where there is no residual."""
    dx, dweight, dbias, dresidual = engine.backward(
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
    )
    return dx, dweight, dbias, dx.new_empty(0) if dresidual is None else dresidual


@_normalize_backward.register_fake
def _(
    x: Tensor,
    dy: Tensor,  # noqa: ARG001
    weight: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    residual: Tensor | None,
    mask: Tensor | None,  # noqa: ARG001
    mean: Tensor,  # noqa: ARG001
    rstd: Tensor,  # noqa: ARG001
    activation: str | None,  # noqa: ARG001
    given: bool,  # noqa: ARG001
    group_size: int | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = x.new_empty(0) if residual is None else torch.empty_like(residual)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dweight, dbias = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    return torch.empty_like(x), dweight, dbias, dresidual


def register_gradient(operator: Any, backward: Any) -> None:
    """Let autograd take the gradient of an operator by another one, both with arguments as those here."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, mask, given_mean, _, activation, _, group_size, _ = inputs
        _, count, mean, m2, rstd = output
        behind = (bias, residual) if activation is not None else (None, None)
        ctx.save_for_backward(x, weight, *behind, mask, mean, rstd)
        ctx.settings = (activation, given_mean is not None, group_size)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias, residual))
        ctx.mark_non_differentiable(count, mean, m2, rstd)

    def differentiate(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, mask, mean, rstd = ctx.saved_tensors
        dx, *found = backward(x, dy, weight, bias, residual, mask, mean, rstd, *ctx.settings)
        if ctx.settings[0] is None:
            found[2] = cleared(dy, mask)
        cast = (None if dtype is None else g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True))
        return dx, *cast, *(None,) * 7

    operator.register_autograd(differentiate, setup_context=setup_context)


register_gradient(_normalize, _normalize_backward)


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
    *,
    strict: bool = False,
) -> Normalized:
    """Normalize under `torch.compile`; as `operators.apply` and `halves.apply`."""
    if plan.choice is not None:
        return compiled_choice.apply(x, weight, bias, residual, plan, strict=strict)
    given = plan.given or (None, None)
    arguments = (x, weight, bias, residual, plan.mask, *given, plan.activation, plan.eps, plan.group_size)
    seen = None if strict or plan.mask is not None or x.is_cpu else _seen(x, plan)
    y, count, mean, m2, _ = _normalize(*arguments, strict) if seen is None else seen(*arguments)
    if plan.given is not None:
        return Normalized(y, None)
    if plan.mask is None and plan.group_size is None:
        return Normalized(y, PooledMoments(x.shape[0] * math.prod(x.shape[2:]), mean, m2))
    return Normalized(y, of_groups(count, mean, m2))


def _seen(x: Tensor, plan: Plan) -> Any:
    """Return the operator that the compiler looks into, if there is one for x."""
    from . import compiled_kernels

    return compiled_kernels.normalize if compiled_kernels.can_see(x, plan.eps, plan.group_size) else None
