"""The forward and its gradient as `torch.library` operators: what `torch.compile` sees, not the kernels.

The compiler takes each as one opaque call, so a compiled layer computes what an eager one does. Eager calls
do not come here: a pair of custom operators costs more than a whole small stock layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.choose import engine
from batchnorm.kernels.interface import wide_dtype
from batchnorm.statistics.moments import PooledMoments

from . import compiled_choice
from .compiled_groups import groups_of
from .differentiable import Normalized, cleared
from .moving import check_finite, of_groups
from .plan import Plan


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
    options = {"residual": residual, "activation": activation, "mask": mask}
    if given_mean is None or given_rstd is None:
        y, (count, mean, m2), rstd = engine(x).forward(
            x,
            eps,
            weight,
            bias,
            group_size=group_size,
            **options,  # type: ignore[arg-type]
        )
        if strict:
            check_finite(mean, m2)
        return y, count, mean, m2, rstd
    y = engine(x).normalize(x, given_mean, given_rstd, weight, bias, **options)  # type: ignore[arg-type]
    nothing = torch.zeros_like(given_mean)
    return y, nothing[:, 0].clone(), given_mean.clone(), nothing, given_rstd.clone()


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
    dx, dweight, dbias, dresidual = engine(x).backward(
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, mask, given_mean, _, activation, _, group_size, _ = inputs
    _, count, mean, m2, rstd = output
    behind = (bias, residual) if activation is not None else (None, None)
    ctx.save_for_backward(x, weight, *behind, mask, mean, rstd)
    ctx.settings = (activation, given_mean is not None, group_size)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias, residual))
    ctx.mark_non_differentiable(count, mean, m2, rstd)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, mask, mean, rstd = ctx.saved_tensors
    activation, given, group_size = ctx.settings
    dx, *parameters = _normalize_backward(
        x, dy, weight, bias, residual, mask, mean, rstd, activation, given, group_size
    )
    if activation is None:
        parameters[2] = cleared(dy, mask)
    cast = (None if dtype is None else g.to(dtype) for g, dtype in zip(parameters, ctx.dtypes, strict=True))
    return dx, *cast, *(None,) * 7


_normalize.register_autograd(_backward, setup_context=_setup_context)


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
    mean, rstd = plan.given or (None, None)
    y, count, mean, m2, _ = _normalize(
        x, weight, bias, residual, plan.mask, mean, rstd, plan.activation, plan.eps, plan.group_size, strict
    )
    if plan.given is not None:
        return Normalized(y, None)
    if plan.mask is None and plan.group_size is None:
        return Normalized(y, PooledMoments(x.shape[0] * math.prod(x.shape[2:]), mean, m2))
    return Normalized(y, of_groups(count, mean, m2))
