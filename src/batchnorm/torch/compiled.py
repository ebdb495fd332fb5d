"""The forward and its gradient as `torch.library` operators: what `torch.compile` sees, not the kernels.

The compiler takes each as one opaque call, so a compiled layer computes what an eager one does. Eager calls
do not come here: a pair of custom operators costs more than a whole small stock layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.choose import engine
from batchnorm.kernels.interface import wide_dtype

from .differentiable import Normalized


@torch.library.custom_op("batchnorm::normalize", mutates_args=())
def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given_mean: Tensor | None,
    given_rstd: Tensor | None,
    activation: str | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if given_mean is None or given_rstd is None:
        y, found, rstd = engine(x).forward(x, eps, weight, bias, residual=residual, activation=activation)
        return y, found.mean, found.m2, rstd
    y = engine(x).normalize(x, given_mean, given_rstd, weight, bias, residual=residual, activation=activation)
    return y, given_mean.clone(), torch.zeros_like(given_mean), given_rstd.clone()


@_normalize.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    residual: Tensor | None,  # noqa: ARG001
    given_mean: Tensor | None,  # noqa: ARG001
    given_rstd: Tensor | None,  # noqa: ARG001
    activation: str | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, m2, rstd = (x.new_empty(1, x.shape[1], dtype=wide_dtype(x.device)) for _ in range(3))
    return torch.empty_like(x), mean, m2, rstd


@torch.library.custom_op("batchnorm::normalize_backward", mutates_args=())
def _normalize_backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str | None,
    given: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dweight, dbias, dresidual = engine(x).backward(
        x, dy, mean, rstd, given, weight, bias, residual=residual, activation=activation
    )
    return dx, dweight, dbias, dx.new_empty(0) if dresidual is None else dresidual


@_normalize_backward.register_fake
def _(
    x: Tensor,
    dy: Tensor,  # noqa: ARG001
    weight: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    residual: Tensor | None,
    mean: Tensor,  # noqa: ARG001
    rstd: Tensor,  # noqa: ARG001
    activation: str | None,  # noqa: ARG001
    given: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = x.new_empty(0) if residual is None else torch.empty_like(residual)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dweight, dbias = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    return torch.empty_like(x), dweight, dbias, dresidual


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, given_mean, _, activation, _ = inputs
    _, mean, m2, rstd = output
    behind = (bias, residual) if activation is not None else (None, None)
    ctx.save_for_backward(x, weight, *behind, mean, rstd)
    ctx.settings = (activation, given_mean is not None)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias, residual))
    ctx.mark_non_differentiable(mean, m2, rstd)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, mean, rstd = ctx.saved_tensors
    activation, given = ctx.settings
    dx, *parameters = _normalize_backward(x, dy, weight, bias, residual, mean, rstd, activation, given)
    if activation is None:
        parameters[2] = dy
    cast = (None if dtype is None else g.to(dtype) for g, dtype in zip(parameters, ctx.dtypes, strict=True))
    return dx, *cast, None, None, None, None


_normalize.register_autograd(_backward, setup_context=_setup_context)


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    eps: float,
    given: tuple[Tensor, Tensor] | None = None,
) -> Normalized:
    """Normalize under `torch.compile`; as `operators.apply`."""
    mean, rstd = given or (None, None)
    y, mean, m2, _ = _normalize(x, weight, bias, residual, mean, rstd, activation, eps)
    return Normalized(y, mean, m2) if given is None else Normalized(y, None, None)
