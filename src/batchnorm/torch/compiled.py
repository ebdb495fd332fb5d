"""Runs calls under `torch.compile` as `torch.library` operators, one each way.

The compiler takes each as one opaque call, so a compiled layer computes what an eager one does. There are two
pairs: one for calls by the batch or given statistics, one for calls by a policy. Operators that the compiler
looks into are in `compiled_kernels.py`. Eager calls do not use these operators: a pair of custom operators
costs more than a whole small stock layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import RecomputeError
from batchnorm.kernels import choose
from batchnorm.kernels.interface import Engine, wide_dtype
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policies import from_text
from batchnorm.statistics.policy import Chosen, Known, Policy
from batchnorm.statistics.synced import Synced

from . import autograd
from .call import Call
from .collectives.operations import Ranks, numbered, sharing_ranks
from .composite import Normalized, cleared
from .policy_step import PolicyStep
from .running_stats import check_finite, of_groups
from .tracing import is_in_backward

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


def cast(ctx: Any, dy: Tensor, activation: str | None, mask: Tensor | None, found: Gradients) -> list[Any]:
    """Return dx, dweight, dbias and dresidual in the dtypes of their inputs; None for an input of None."""
    dx, *others = found
    if activation is None:
        others[2] = cleared(dy, mask)
    return [
        dx,
        *(None if dtype is None else g.to(dtype) for g, dtype in zip(others, ctx.dtypes, strict=True)),
    ]


def normalized(engine: Engine, call: Call, mean: Tensor | None, rstd: Tensor | None) -> Outputs:
    """Return y, count, mean, m2 and rstd, none a view of another; for given statistics, count = m2 = 0."""
    if mean is None or rstd is None:
        y, statistics = engine.forward(call)
        (count, *moments), found = engine.unpack(statistics, call.x.shape[1])
        if len(statistics) == 1:  # these are views of one tensor, which an operator must not return
            return y, count.clone(), moments[0].clone(), moments[1].clone(), found.clone()
        return y, count, moments[0], moments[1], found
    y = engine.normalize(call, (mean, rstd))
    return y, mean.new_zeros(mean.shape[0]), mean.clone(), torch.zeros_like(mean), rstd.clone()


def gradients(
    engine: Engine, call: Call, dy: Tensor, mean: Tensor, rstd: Tensor, constant: bool
) -> Gradients:
    """Return dx, dweight, dbias and dresidual, which is empty where there is no residual."""
    dx, dweight, dbias, dresidual = engine.backward(call, dy, (mean, rstd), constant)
    return dx, dweight, dbias, dx.new_empty(0) if dresidual is None else dresidual


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
    call = Call(x, weight, bias, residual, mask, activation, eps, group_size)
    found = normalized(choose.engine(x), call, given_mean, given_rstd)
    if strict and given_mean is None:
        check_finite(found[2], found[3])
    return found


@_normalize.register_fake
def _(x: Tensor, *others: Any) -> Outputs:
    groups, wide = groups_of(x, others[-2]), wide_dtype(x.device)
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
    constant: bool,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(x, weight, bias, residual, mask, activation, group_size=group_size)
    return gradients(choose.engine(x), call, dy, mean, rstd, constant)


@_normalize_backward.register_fake
def _(x: Tensor, *others: Any) -> Gradients:
    return fake_gradients(x, others[3])


def register_gradient(operator: Any, backward: Callable[..., Gradients]) -> None:
    """Register an operator's gradient, which another operator computes; both have arguments as those here."""

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
        found = backward(x, dy, weight, bias, residual, mask, mean, rstd, *ctx.settings)
        return *cast(ctx, dy, ctx.settings[0], mask, found), *(None,) * 7

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
    arguments = (*tensors, call.activation, call.eps, call.group_size)
    y, count, mean, m2, _ = _normalize(*arguments, strict) if visible is None else visible(*arguments)
    if given is not None:
        return Normalized(y, None)
    if call.mask is None and call.group_size is None:
        return Normalized(y, PooledMoments(x.shape[0] * math.prod(x.shape[2:]), mean, m2))
    return Normalized(y, of_groups(count, mean, m2))


@torch.library.custom_op("batchnorm::normalize_chosen", mutates_args=())
def _normalize_chosen(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    known_mean: Tensor | None,
    known_var: Tensor | None,
    batches: Tensor | None,
    samples: Tensor | None,
    policy: str,
    training: bool,
    shares: bool,
    small_batch_fallback: bool,
    label: str,
    activation: str | None,
    eps: float,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found, ranks = from_text(policy), None
    if shares and isinstance(found, Synced):
        ranks = sharing_ranks(found.group, found.timeout)
        ranks = None if ranks is None else numbered(ranks, x.device)
    known = Known(known_mean, known_var, batches, float(x.shape[0]) if samples is None else samples, eps)
    step = PolicyStep(found, training, known, ranks, label, small_batch_fallback)
    call = Call(x, weight, bias, residual, mask, activation, eps, found.groups(training))
    if training and (small_batch_fallback or found.needs_running) and is_in_backward():
        raise RecomputeError(
            f"a compiled forward with statistics={found} is computed again by activation "
            "checkpointing, and its running statistics have moved since: leave this layer out of "
            "checkpointing, or the checkpointed part out of torch.compile",
            label or None,
        )
    batch, chosen = autograd.measured(choose.engine(x), call, step, strict=strict)
    y = choose.engine(x).normalize(call, chosen[:2])
    count = torch.zeros_like(batch.mean[:, :1]) + batch.count
    tables = [value + torch.zeros_like(batch.mean) for value in chosen]  # some may be numbers
    sharers = torch.tensor([0, 0] if ranks is None else [ranks.size, ranks.call])
    return y, count, torch.stack([batch.mean, batch.m2, *tables]), sharers


@_normalize_chosen.register_fake
def _(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    policy, training = others[8:10]
    groups, wide = groups_of(x, from_text(policy).groups(training)), wide_dtype(x.device)
    tables = x.new_empty(7, groups, x.shape[1], dtype=wide)
    sharers = torch.empty(2, dtype=torch.int64, device="cpu")
    return torch.empty_like(x), x.new_empty(groups, 1, dtype=wide), tables, sharers


@torch.library.custom_op("batchnorm::normalize_chosen_backward", mutates_args=())
def _normalize_chosen_backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    count: Tensor,
    tables: Tensor,
    sharers: Tensor,
    policy: str,
    training: bool,
    label: str,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found: Policy = from_text(policy)
    members, number = sharers.tolist()
    ranks = None
    if members and isinstance(found, Synced):
        ranks = Ranks(found.group, found.timeout, members, number)
    known = Known(None, None, None, float(x.shape[0]), 0.0)
    step = PolicyStep(found, training, known, ranks, label)
    call = Call(x, weight, bias, residual, mask, activation, 0.0, found.groups(training))
    mean, m2, *chosen = tables.unbind()
    batch = PooledMoments(count, mean, m2)
    dx, dweight, dbias, dresidual = autograd.gradients_of(
        choose.engine(x), call, dy, step, batch, Chosen(*chosen)
    )
    assert dx is not None
    return dx, dweight, dbias, dx.new_empty(0) if dresidual is None else dresidual


@_normalize_chosen_backward.register_fake
def _(x: Tensor, *others: Any) -> Gradients:
    return fake_gradients(x, others[3])


def _setup_chosen(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, mask, _, _, _, _, policy, training, _, _, label, activation, _, _ = inputs
    _, count, tables, sharers = output
    behind = (bias, residual) if activation is not None else (None, None)
    ctx.save_for_backward(x, weight, *behind, mask, count, tables, sharers)
    ctx.settings = (policy, training, label, activation)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias, residual))
    ctx.mark_non_differentiable(count, tables, sharers)


def _chosen_gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, mask, *kept = ctx.saved_tensors
    found = _normalize_chosen_backward(x, dy, weight, bias, residual, mask, *kept, *ctx.settings)
    return *cast(ctx, dy, ctx.settings[-1], mask, found), *(None,) * 13


_normalize_chosen.register_autograd(_chosen_gradients, setup_context=_setup_chosen)


def normalize_by_policy(call: Call, step: PolicyStep, *, strict: bool) -> Normalized:
    """Normalize under `torch.compile` by what the step chooses; as `autograd.normalize_by_policy`."""
    mean, var, batches, samples, eps = step.known
    y, count, tables, _ = _normalize_chosen(
        call.x,
        call.weight,
        call.bias,
        call.residual,
        call.mask,
        mean,
        var,
        batches,
        samples if isinstance(samples, Tensor) else None,
        step.policy.text,
        step.training,
        step.ranks is not None,
        step.small_batch_fallback,
        step.label,
        call.activation,
        eps,
        strict,
    )
    return Normalized(y, PooledMoments(count, tables[0], tables[1]))
