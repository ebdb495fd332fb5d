"""The forward and its gradient over the kernels, as an autograd Function: the path of every eager call.

Kept for the backward: x, and per channel mean and rstd; the residual only behind an activation, whose
derivative needs it. No running buffer is ever kept, so updating one between two forwards is safe.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.choose import engine

from . import differentiable


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, and the batch's mean, m2 and rstd, `[1, C]` each."""
    y, found, rstd = engine(x).forward(x, eps, weight, bias, residual=residual, activation=activation)
    return y, found.mean, found.m2, rstd


def forward_given(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    mean: Tensor,
    rstd: Tensor,
) -> Tensor:
    """Return y by the given statistics, `[1, C]` each."""
    return engine(x).normalize(x, mean, rstd, weight, bias, residual=residual, activation=activation)


def backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    mean: Tensor,
    rstd: Tensor,
    given: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dx, dweight and dbias `[C]` (wide), dresidual; `given`: the statistics were constants."""
    dx, sum_dy, sum_dy_xhat, dresidual = engine(x).backward(
        x, dy, mean, rstd, given, weight, bias, residual=residual, activation=activation
    )
    return dx, sum_dy_xhat.view(-1), sum_dy.view(-1), dresidual


class _BatchNorm(torch.autograd.Function):
    """(x, weight, bias, residual, activation, eps, given, found) -> y; see `differentiable.normalize`.

    The batch's mean and m2 are appended to the list `found`: as further outputs they would cost a quarter of
    the time of a whole small stock layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
        eps: float,
        given: tuple[Tensor, Tensor] | None,
        found: list[Tensor],
    ) -> Tensor:
        if given is None:
            y, mean, m2, rstd = forward(x, weight, bias, residual, activation, eps)
            found += (mean, m2)
            statistics = (mean, rstd)
        else:
            statistics = given
            y = forward_given(x, weight, bias, residual, activation, *statistics)
        behind = (bias, residual) if activation is not None else (None, None)
        ctx.save_for_backward(x, weight, *behind, *statistics)
        ctx.settings = (activation, eps, given is not None)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias, residual))
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        x, weight, bias, residual, mean, rstd = ctx.saved_tensors
        activation, _, given = ctx.settings
        if torch.is_grad_enabled() or differentiable.is_transforming() or _is_batch(dy):
            gradients = _differentiable_gradients(ctx, x, dy, weight, bias, residual, mean, rstd)
        else:
            gradients = backward(x, dy, weight, bias, residual, activation, mean, rstd, given)
        dx, dweight, dbias, dresidual = gradients
        if activation is None:
            dresidual = dy
        parameters = (dweight, dbias, dresidual)
        cast = (
            g.to(dtype) if need and g is not None else None
            for g, dtype, need in zip(parameters, ctx.dtypes, ctx.needs_input_grad[1:4], strict=True)
        )
        return dx if ctx.needs_input_grad[0] else None, *cast, None, None, None, None


def _is_batch(dy: Tensor) -> bool:
    """Whether `dy` is a batch of cotangents, of `torch.autograd.grad(is_grads_batched=True)`.

    That vectorizes over the backward alone, by a mechanism older than `torch.func`.
    """
    return torch._C._functorch.is_legacy_batchedtensor(dy)


def _differentiable_gradients(
    ctx: Any,
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients by operations that torch can differentiate and transform in their turn.

    That is for double backward; and for a backward in a `vmap` or in forward mode, of a forward outside it.
    """
    activation, eps, given = ctx.settings
    if bias is None and ctx.dtypes[1] is not None:
        # Not kept, as no activation follows: any value gives the same gradient.
        bias = torch.zeros(x.shape[1], dtype=ctx.dtypes[1], device=x.device, requires_grad=True)
    with torch.enable_grad():
        y = differentiable.normalize(
            x, weight, bias, residual, activation, eps, (mean, rstd) if given else None
        ).y
    inputs = [x, weight, bias, residual]
    wanted = {
        index: tensor
        for index, (tensor, need) in enumerate(zip(inputs, ctx.needs_input_grad[:4], strict=True))
        if need and tensor is not None
    }
    found = torch.autograd.grad(y, list(wanted.values()), dy, create_graph=torch.is_grad_enabled())
    gradients = dict(zip(wanted, found, strict=True))
    return tuple(gradients.get(index) for index in range(4))


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    eps: float,
    given: tuple[Tensor, Tensor] | None = None,
) -> differentiable.Normalized:
    """Normalize eagerly; differentiable where an input requires a gradient."""
    if not torch.is_grad_enabled():
        if given is not None:
            return differentiable.Normalized(
                forward_given(x, weight, bias, residual, activation, *given), None, None
            )
        return differentiable.Normalized(*forward(x, weight, bias, residual, activation, eps)[:3])
    found: list[Tensor] = []
    y = _BatchNorm.apply(x, weight, bias, residual, activation, eps, given, found)  # type: ignore[no-untyped-call]
    mean, m2 = found or (None, None)
    return differentiable.Normalized(y, mean, m2)
