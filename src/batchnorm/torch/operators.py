"""The forward and its gradient over the kernels, as an autograd Function: the path of every eager call.

Kept for the backward: x, and per channel mean and rstd; the residual only behind an activation, whose
derivative needs it. No running buffer is ever kept, so updating one between two forwards is safe.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.choose import engine
from batchnorm.kernels.interface import Engine, RunningStatistics

from . import differentiable, recipes


class _BatchNorm(torch.autograd.Function):
    """(engine, x, weight, bias, residual, activation, eps, given, running, found) -> y; see `apply`.

    The batch's mean, m2 and rstd are appended to the list `found`: as further outputs they would cost a
    quarter of the time of a whole small stock layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
        eps: float,
        given: tuple[Tensor, Tensor] | None,
        running: RunningStatistics | None,
        found: list[Tensor],
    ) -> Tensor:
        if given is None:
            y, (_, mean, m2), rstd = engine.forward(
                x, eps, weight, bias, residual=residual, activation=activation, running=running
            )
            found += (mean, m2, rstd)
        else:
            mean, rstd = given
            y = engine.normalize(x, mean, rstd, weight, bias, residual=residual, activation=activation)
        behind = (bias, residual) if activation is not None else (None, None)
        ctx.save_for_backward(x, weight, *behind, mean, rstd)
        ctx.settings = (engine, activation, eps, given is not None)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias, residual))
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        recipes.settle(ctx)
        if dy is None:
            return (None,) * 10
        x, weight, bias, residual, mean, rstd = ctx.saved_tensors
        engine, activation, _, given = ctx.settings
        if torch.is_grad_enabled() or differentiable.is_transforming() or _is_batch(dy):
            gradients = _differentiable_gradients(ctx, x, dy, weight, bias, residual, mean, rstd)
        else:
            gradients = engine.backward(
                x, dy, mean, rstd, given, weight, bias, residual=residual, activation=activation
            )
        dx, dweight, dbias, dresidual = gradients
        if activation is None:
            dresidual = dy
        needed, dtypes = ctx.needs_input_grad, ctx.dtypes
        return (
            None,
            dx if needed[1] else None,
            dweight.to(dtypes[0]) if needed[2] and dweight is not None else None,
            dbias.to(dtypes[1]) if needed[3] and dbias is not None else None,
            dresidual.to(dtypes[2]) if needed[4] and dresidual is not None else None,
            *(None,) * 5,
        )


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
    _, activation, eps, given = ctx.settings
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
        for index, (tensor, need) in enumerate(zip(inputs, ctx.needs_input_grad[1:5], strict=True))
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
    running: RunningStatistics | None = None,
) -> differentiable.Normalized:
    """Normalize eagerly, as `differentiable.normalize`; differentiable where an input requires a gradient.

    Args:
        running: running statistics, which the engine moves if it can.
    """
    chosen = engine(x)
    if running is not None and not chosen.moves(x, running):
        running = None
    moved = running is not None
    if not torch.is_grad_enabled():
        if given is not None:
            y = chosen.normalize(x, *given, weight, bias, residual=residual, activation=activation)
            return differentiable.Normalized(y, None, None)
        y, moments, _ = chosen.forward(
            x, eps, weight, bias, residual=residual, activation=activation, running=running
        )
        return differentiable.Normalized(y, moments.mean, moments.m2, moved)
    found: list[Tensor] = []
    y = _BatchNorm.apply(chosen, x, weight, bias, residual, activation, eps, given, running, found)  # type: ignore[no-untyped-call]
    if given is not None:
        recipes.record(y, chosen, x, residual, given, (weight, bias), activation)
        return differentiable.Normalized(y, None, None)
    mean, m2, rstd = found
    recipes.record(y, chosen, x, residual, (mean, rstd), (weight, bias), activation)
    return differentiable.Normalized(y, mean, m2, moved)
