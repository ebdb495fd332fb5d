"""Runs calls by the batch or by given statistics under `torch.compile`, as `torch.library` operators.

The compiler takes each as one opaque call, so a compiled layer computes what an eager one does. The same
functions, as operators that the compiler looks into, are in `compiled_kernels.py`. Eager calls do not use
operators: a pair of custom operators costs more than a whole small stock layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import choose
from batchnorm.kernels.interface import wide_dtype
from batchnorm.statistics.moments import PooledMoments

from .call import Call, Normalized, cast
from .moments import check_finite, of_groups

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def groups_of(x: Tensor, group_size: int | None) -> int:
    """Return the number of groups of `group_size` samples, the last of which may be smaller; at least 1.

    The number of samples may be a symbol.
    """
    if group_size is None:
        return 1
    groups: int = torch.sym_max(1, (x.shape[0] + group_size - 1) // group_size)  # type: ignore[no-untyped-call]
    return groups


def fake_gradients(x: Tensor, residual: Tensor | None) -> Gradients:
    """Return dx, dweight, dbias and dresidual as the compiler sees them: sizes and dtypes alone."""
    dresidual = x.new_empty(0) if residual is None else torch.empty_like(residual)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dweight, dbias = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    return torch.empty_like(x), dweight, dbias, dresidual


def run_forward(
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
    sources: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, count, mean, m2 and rstd, none a view of another; for given statistics, count = m2 = 0.

    Args:
        given_mean, given_rstd: statistics to normalize by; None = those of the batch.
        strict: raise NonFiniteError where the batch's moments are not finite.
        sources: a digest of the kernels for GPUs, which then run; empty = the engine that `x` gets.
    """
    call = Call(x, weight, bias, residual, mask, activation, eps, group_size)
    engine = choose.load("gpu") if sources else choose.engine(x)
    if given_mean is not None and given_rstd is not None:
        y, groups = engine.normalize(call, (given_mean, given_rstd)), given_mean.shape[0]
        none = given_mean.new_zeros(groups)
        return y, none, given_mean.clone(), torch.zeros_like(given_mean), given_rstd.clone()
    y, statistics = engine.forward(call)
    (count, mean, m2), rstd = engine.unpack(statistics, x.shape[1])
    if strict:
        check_finite(PooledMoments(count, mean, m2))
    if len(statistics) == 1:  # these are views of one tensor, which an operator must not return
        return y, count.clone(), mean.clone(), m2.clone(), rstd.clone()
    return y, count, mean, m2, rstd


def run_backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str | None,
    constant: bool,
    group_size: int | None,
    sources: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias and dresidual, which is empty where there is no residual."""
    call = Call(x, weight, bias, residual, mask, activation, group_size=group_size)
    engine = choose.load("gpu") if sources else choose.engine(x)
    dx, dweight, dbias, dresidual = engine.backward(call, dy, (mean, rstd), constant)
    return dx, dweight, dbias, dx.new_empty(0) if dresidual is None else dresidual


_normalize = torch.library.custom_op("batchnorm::normalize", run_forward, mutates_args=())
_normalize_backward = torch.library.custom_op("batchnorm::normalize_backward", run_backward, mutates_args=())


@_normalize.register_fake
def _(x: Tensor, *others: Any) -> Outputs:
    groups, wide = groups_of(x, others[8]), wide_dtype(x.device)
    mean, m2, rstd = (x.new_empty(groups, x.shape[1], dtype=wide) for _ in range(3))
    return torch.empty_like(x), x.new_empty(groups, dtype=wide), mean, m2, rstd


@_normalize_backward.register_fake
def _(x: Tensor, *others: Any) -> Gradients:
    return fake_gradients(x, others[3])


def register_gradient(operator: Any, backward: Callable[..., Gradients]) -> None:
    """Register an operator's gradient, which another operator computes; both have arguments as those here."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, mask, given_mean, _, activation, _, group_size, _, sources = inputs
        _, count, mean, m2, rstd = output
        behind = (bias, residual) if activation is not None else (None, None)
        ctx.save_for_backward(x, weight, *behind, mask, mean, rstd)
        ctx.settings = (activation, given_mean is not None, group_size, sources)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias, residual))
        ctx.mark_non_differentiable(count, mean, m2, rstd)

    def differentiate(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, mask, mean, rstd = ctx.saved_tensors
        found = backward(x, dy, weight, bias, residual, mask, mean, rstd, *ctx.settings)
        return *cast(ctx, found, dy, ctx.settings[0], mask), *(None,) * 8

    operator.register_autograd(differentiate, setup_context=setup_context)


register_gradient(_normalize, _normalize_backward)


def normalize(
    call: Call,
    given: tuple[Tensor, Tensor] | None,
    *,
    strict: bool = False,
    visible: Callable[..., tuple[Tensor, ...]] | None = None,
) -> Normalized:
    """Normalize under `torch.compile`; as `autograd.normalize`.

    Args:
        call: the call.
        given: mean and rstd to normalize by, constants; None = those of the batch.
        strict: raise NonFiniteError where moments are not finite.
        visible: the operator that the compiler looks into, if there is one for this call.
    """
    x = call.x
    tensors = (x, call.weight, call.bias, call.residual, call.mask, *(given or (None, None)))
    arguments = (*tensors, call.activation, call.eps, call.group_size, strict)
    y, count, mean, m2, _ = _normalize(*arguments) if visible is None else visible(*arguments)
    if given is not None:
        return Normalized(y, None)
    if call.mask is None and call.group_size is None:
        return Normalized(y, PooledMoments(x.shape[0] * math.prod(x.shape[2:]), mean, m2))
    return Normalized(y, of_groups(count, mean, m2))
