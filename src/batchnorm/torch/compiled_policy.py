"""Runs calls by a policy under `torch.compile`, as a pair of `torch.library` operators, one each way.

They are opaque to the compiler, as those of `compiled.py`. Sharing moments over ranks is part of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import RecomputeError
from batchnorm.kernels import choose
from batchnorm.kernels.interface import wide_dtype
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import Chosen, Known, Policy
from batchnorm.statistics.policy_config import from_text
from batchnorm.statistics.synced import Synced

from .call import Call, Normalized, cast
from .collectives.operations import Ranks, numbered, sharing_ranks
from .compiled import Gradients, fake_gradients, groups_of
from .policy_step import PolicyStep
from .tracing import is_in_backward


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
    engine = choose.engine(x)
    batch, chosen = step.measured(engine, call, strict=strict)
    y = engine.normalize(call, chosen[:2])
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
    dx, dweight, dbias, dresidual = step.gradients(choose.engine(x), call, dy, batch, Chosen(*chosen))
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
    return *cast(ctx, found, dy, ctx.settings[-1], mask), *(None,) * 13


_normalize_chosen.register_autograd(_chosen_gradients, setup_context=_setup_chosen)


def normalize(call: Call, step: PolicyStep, *, strict: bool) -> Normalized:
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
