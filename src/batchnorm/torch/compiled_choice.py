"""As `compiled.py`, for calls with a policy between their halves: one operator each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import RecomputeError
from batchnorm.kernels.choose import engine
from batchnorm.kernels.interface import wide_dtype
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import Chosen, Known, Policy
from batchnorm.statistics.serialized import from_text
from batchnorm.statistics.synced import Synced

from . import halves
from .collectives.operations import Ranks, numbered, sharing_ranks
from .compiled_groups import groups_of
from .composite import Normalized, cleared
from .plan import Plan
from .policy_step import Choice
from .tracing import is_in_backward

# The tensors that a choice knows, per channel or one number each.
_NONE = (None,) * 4


def _plan(
    x: Tensor,
    mask: Tensor | None,
    known: tuple[Tensor | None, ...],
    policy: Policy,
    training: bool,
    ranks: Ranks | None,
    small_batch_fallback: bool,
    label: str,
    activation: str | None,
    eps: float,
) -> Plan:
    """Return the plan of a call, put together again from what an operator's arguments can be."""
    mean, var, batches, samples = known
    choice = Choice(
        policy,
        training,
        Known(mean, var, batches, float(x.shape[0]) if samples is None else samples, eps),
        ranks,
        label,
        small_batch_fallback,
    )
    return Plan(eps, activation, mask, policy.groups(training), None, choice)


@torch.library.custom_op("batchnorm::normalize_chosen", mutates_args=())
def _normalize(
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
    known, found, ranks = (known_mean, known_var, batches, samples), from_text(policy), None
    if shares and isinstance(found, Synced):
        ranks = sharing_ranks(found.group, found.timeout)
        ranks = None if ranks is None else numbered(ranks, x.device)
    plan = _plan(x, mask, known, found, training, ranks, small_batch_fallback, label, activation, eps)
    assert plan.choice is not None
    if training and (small_batch_fallback or plan.choice.policy.needs_running) and is_in_backward():
        raise RecomputeError(
            f"a compiled forward with statistics={plan.choice.policy} is computed again by activation "
            "checkpointing, and its running statistics have moved since: leave this layer out of "
            "checkpointing, or the checkpointed part out of torch.compile",
            label or None,
        )
    batch, chosen = halves.measured(engine(x), x, plan, strict=strict)
    y = engine(x).normalize(x, chosen.mean, chosen.rstd, weight, bias, residual=residual, **plan.options)
    count = torch.zeros_like(batch.mean[:, :1]) + batch.count
    tables = [value + torch.zeros_like(batch.mean) for value in chosen]  # some may be numbers
    sharers = torch.tensor([0, 0] if ranks is None else [ranks.size, ranks.call])
    return y, count, torch.stack([batch.mean, batch.m2, *tables]), sharers


@_normalize.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    residual: Tensor | None,  # noqa: ARG001
    mask: Tensor | None,  # noqa: ARG001
    known_mean: Tensor | None,  # noqa: ARG001
    known_var: Tensor | None,  # noqa: ARG001
    batches: Tensor | None,  # noqa: ARG001
    samples: Tensor | None,  # noqa: ARG001
    policy: str,
    training: bool,
    shares: bool,  # noqa: ARG001
    small_batch_fallback: bool,  # noqa: ARG001
    label: str,  # noqa: ARG001
    activation: str | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    strict: bool,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = from_text(policy).groups(training)
    groups = groups_of(x, size)
    wide = wide_dtype(x.device)
    tables = x.new_empty(7, groups, x.shape[1], dtype=wide)
    sharers = torch.empty(2, dtype=torch.int64, device="cpu")
    return torch.empty_like(x), x.new_empty(groups, 1, dtype=wide), tables, sharers


@torch.library.custom_op("batchnorm::normalize_chosen_backward", mutates_args=())
def _normalize_backward(
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
    found, ranks = from_text(policy), None
    members, call = sharers.tolist()
    if members and isinstance(found, Synced):
        ranks = Ranks(found.group, found.timeout, members, call)
    plan = _plan(x, mask, _NONE, found, training, ranks, False, label, activation, 0.0)
    mean, m2, *chosen = tables.unbind()
    batch = PooledMoments(count, mean, m2)
    dx, dweight, dbias, dresidual = halves.gradients_of(
        engine(x), x, dy, weight, bias, residual, plan, batch, Chosen(*chosen)
    )
    assert dx is not None
    return dx, dweight, dbias, dx.new_empty(0) if dresidual is None else dresidual


@_normalize_backward.register_fake
def _(
    x: Tensor,
    dy: Tensor,  # noqa: ARG001
    weight: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    residual: Tensor | None,
    mask: Tensor | None,  # noqa: ARG001
    count: Tensor,  # noqa: ARG001
    tables: Tensor,  # noqa: ARG001
    sharers: Tensor,  # noqa: ARG001
    policy: str,  # noqa: ARG001
    training: bool,  # noqa: ARG001
    label: str,  # noqa: ARG001
    activation: str | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = x.new_empty(0) if residual is None else torch.empty_like(residual)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dweight, dbias = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    return torch.empty_like(x), dweight, dbias, dresidual


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, mask, _, _, _, _, policy, training, _, _, label, activation, _, _ = inputs
    _, count, tables, sharers = output
    behind = (bias, residual) if activation is not None else (None, None)
    ctx.save_for_backward(x, weight, *behind, mask, count, tables, sharers)
    ctx.settings = (policy, training, label, activation)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias, residual))
    ctx.mark_non_differentiable(count, tables, sharers)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, mask, *kept = ctx.saved_tensors
    dx, *parameters = _normalize_backward(x, dy, weight, bias, residual, mask, *kept, *ctx.settings)
    if ctx.settings[-1] is None:
        parameters[2] = cleared(dy, mask)
    cast = (None if dtype is None else g.to(dtype) for g, dtype in zip(parameters, ctx.dtypes, strict=True))
    return dx, *cast, *(None,) * 13


_normalize.register_autograd(_backward, setup_context=_setup_context)


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
    *,
    strict: bool,
) -> Normalized:
    """Normalize under `torch.compile` by what the plan's choice takes; as `halves.apply`."""
    choice = plan.choice
    assert choice is not None
    mean, var, batches, samples, eps = choice.known
    y, count, tables, _ = _normalize(
        x,
        weight,
        bias,
        residual,
        plan.mask,
        mean,
        var,
        batches,
        samples if isinstance(samples, Tensor) else None,
        choice.policy.text,
        choice.training,
        choice.ranks is not None,
        choice.small_batch_fallback,
        choice.label,
        plan.activation,
        eps,
        strict,
    )
    return Normalized(y, PooledMoments(count, tables[0], tables[1]))
