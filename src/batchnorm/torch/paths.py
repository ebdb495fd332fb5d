"""One call from its checks to its running statistics: the mode that it is in, and the path that it needs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm.errors import OptionError
from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.kernels.choose import engine
from batchnorm.kernels.interface import RunningStatistics, wide_dtype
from batchnorm.statistics.batch import Batch, running_update
from batchnorm.statistics.synced import Synced

from . import checks, collectives, compiled, differentiable, halves, operators
from .choice import Choice, known_to, samples_of
from .differentiable import Normalized
from .moving import move
from .plan import Plan
from .settings import Settings, Tracked


class Mode(NamedTuple):
    """What a call does with its batch.

    Attributes:
        measures: it takes moments; if not, it normalizes by the running statistics.
        moves: the running statistics then move.
        needs_two: one value per channel is refused.
        ranks: who shares the moments; None = nobody.
        is_lenient: groups of fewer than two values are normalized by the running statistics.
    """

    measures: bool
    moves: bool
    needs_two: bool
    ranks: collectives.Ranks | None = None
    is_lenient: bool = False


# The mode of most calls, by whether statistics are tracked.
_USUAL = {tracked: Mode(measures=True, moves=tracked, needs_two=True) for tracked in (False, True)}
_GIVEN = Mode(measures=False, moves=False, needs_two=False)


def mode_of(input: Tensor, tracked: Tracked, settings: Settings, mask: Tensor | None) -> Mode:
    """Return what a call does with its batch."""
    policy, training = settings.statistics, settings.training
    is_tracked = tracked.mean is not None or tracked.var is not None or tracked.batches is not None
    if not policy.measures(training):
        return _GIVEN
    moves = is_tracked and policy.moves(training) and not is_recomputed()
    if type(policy) is Batch and settings.small_batch == "raise":
        return _USUAL[moves]
    ranks = None
    if isinstance(policy, Synced) and training:
        everyone = collectives.Ranks(policy.group, policy.timeout)
        ranks = everyone if collectives.members(everyone) > 1 else None
    needs_two = training and ranks is None
    is_lenient = False
    if (
        needs_two
        and settings.small_batch == "running"
        and tracked.mean is not None
        and tracked.var is not None
    ):
        smallest = _smallest_group(input, policy.groups(training))
        if smallest == 1 and smallest == _values(input):
            return _GIVEN
        is_lenient = smallest == 1 or mask is not None
        needs_two = False
    return Mode(True, moves, needs_two, ranks, is_lenient)


def is_recomputed() -> bool:
    """Whether this forward runs within a backward: activation checkpointing computes it again.

    Its batch has moved the running statistics already, in the first pass.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _values(input: Tensor) -> int:
    return input.shape[0] * math.prod(input.shape[2:]) if input.dim() > 1 else 0


def _smallest_group(input: Tensor, size: int | None) -> int:
    """Return the number of values per channel of the smallest group of samples."""
    samples = input.shape[0] if input.dim() > 1 else 0
    if size is not None and samples:
        samples = min(size, samples % size or size)
    return samples * math.prod(input.shape[2:])


def tracked_batch_norm(
    input: Tensor,
    tracked: Tracked,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Normalize, and move the running statistics in place: last, after everything that can fail."""
    tensors = (input, tracked.mean, tracked.var, weight, bias, residual, mask)
    if has_torch_function(tensors):
        found: Tensor = handle_torch_function(
            tracked_batch_norm, tensors, input, tracked, weight, bias, residual, mask, settings
        )
        return found
    mode = mode_of(input, tracked, settings, mask)
    check(input, tracked, weight, bias, residual, mask, settings, mode)
    if is_exported_as_stock(settings, mode, mask):
        y = stock(input, tracked, weight, bias, residual, settings, mode)
        if mode.moves and tracked.batches is not None:
            tracked.batches.add_(1)
        return y
    running = None
    policy, nonfinite = settings.statistics, settings.nonfinite
    if (
        mode.moves
        and tracked.pool is None
        and nonfinite == "propagate"
        and mask is None
        and policy.group_size is None
        and isinstance(tracked.momentum, float | int)
    ):
        running = RunningStatistics(tracked.mean, tracked.var, tracked.batches, tracked.momentum)
    y, batch, has_moved = normalize(input, tracked, weight, bias, residual, mask, settings, mode, running)
    if mode.moves and not has_moved and batch is not None:
        if tracked.pool is not None:
            tracked.pool.add(batch, skip=nonfinite == "skip", tracked=tracked)
        else:
            move(tracked, batch, sequential=policy.is_sequential, skip=nonfinite == "skip")
    return y


def check(
    input: Tensor,
    tracked: Tracked,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
    mode: Mode,
) -> None:
    """Raise unless a call can be computed; nothing has changed then."""
    checks.check_activation(settings.activation)
    size = settings.statistics.groups(settings.training) if mode.needs_two else None
    is_tracing = torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    if (
        not is_tracing
        and mask is None
        and size is None
        and checks.is_usual(
            input, (tracked.mean, tracked.var, weight, bias), residual, mode.measures, settings.eps
        )
    ):
        return
    checks.check_eps(settings.eps, settings.training)
    if is_tracing:
        return  # sizes are recorded values there, and torch's own operator checks them
    checks.check_input(input, needs_two=mode.needs_two)
    if size is not None:
        checks.check_groups(input, size, _smallest_group(input, size))
    checks.check_running(tracked.mean, tracked.var, input, given=not mode.measures)
    checks.check_parameter("weight", weight, input)
    checks.check_parameter("bias", bias, input)
    checks.check_residual(residual, input)
    checks.check_mask(mask, input)


def normalize(
    input: Tensor,
    tracked: Tracked,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
    mode: Mode,
    running: RunningStatistics | None = None,
) -> Normalized:
    """Take the path that this call needs: compiled, transformed, or eager; only this one moves `running`."""
    if residual is not None:
        input = input.to(torch.promote_types(input.dtype, residual.dtype))
    if input.dim() < 2:
        return Normalized(_behind(input.clone(), residual, settings.activation), None)
    plan = _plan(input, tracked, mask, settings, mode)
    strict = settings.nonfinite == "raise" and mode.measures and settings.training
    if differentiable.is_transforming() or _is_exporting():
        return differentiable.normalize(input, weight, bias, residual, plan)
    if torch.compiler.is_compiling():
        return compiled.apply(input, weight, bias, residual, plan, strict=strict)
    if plan.choice is not None:
        return halves.apply(input, weight, bias, residual, plan, strict=strict)
    return operators.apply(input, weight, bias, residual, plan, running, strict=strict)


def _plan(input: Tensor, tracked: Tracked, mask: Tensor | None, settings: Settings, mode: Mode) -> Plan:
    policy, training, eps = settings.statistics, settings.training, settings.eps
    if not mode.measures:
        assert tracked.mean is not None
        assert tracked.var is not None
        given = _given(tracked.mean, tracked.var, eps, input)
        return Plan(eps, settings.activation, mask, None, given)
    if type(policy) is Batch and not mode.is_lenient:  # most calls
        return Plan(eps, settings.activation, mask)
    size = policy.groups(training)
    if mode.ranks is None and policy.is_plain(training) and not mode.is_lenient:
        return Plan(eps, settings.activation, mask, size)
    known = known_to(
        tracked.mean, tracked.var, tracked.batches, samples_of(input, mask), eps, wide_dtype(input.device)
    )
    choice = Choice(
        policy, training, known, mode.ranks, settings.label or "batch_norm", mode.is_lenient, tracked.memory
    )
    return Plan(eps, settings.activation, mask, size, None, choice)


def _given(running_mean: Tensor, running_var: Tensor, eps: float, input: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and rstd, `[1, C]`; copies, so that autograd never holds a buffer that will move."""
    if not (differentiable.is_transforming() or torch.compiler.is_compiling()):
        found = engine(input).given(running_mean, running_var, eps)
        if found is not None:
            return found
    wide = wide_dtype(running_mean.device)
    mean = running_mean.detach().to(wide, copy=True)
    return mean.unsqueeze(0), (running_var.detach().to(wide) + eps).rsqrt().unsqueeze(0)


def _is_exporting() -> bool:
    return torch.compiler.is_exporting() or bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call]


def is_exported_as_stock(settings: Settings, mode: Mode, mask: Tensor | None) -> bool:
    """Whether a call is being exported, and torch's own operator says all of it."""
    if not _is_exporting():
        return False
    if mode.ranks is not None:
        raise OptionError(
            "statistics of several ranks cannot be exported: export in evaluation (model.eval())"
        )
    policy, training = settings.statistics, settings.training
    is_plain = policy.is_plain(training) and policy.groups(training) is None and not mode.is_lenient
    return mask is None and (not mode.measures or is_plain)


def stock(
    input: Tensor,
    tracked: Tracked,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    settings: Settings,
    mode: Mode,
) -> Tensor:
    """Emit torch's own operators, which every exporter knows."""
    running_mean, running_var, batches, momentum, *_ = tracked
    if (
        running_mean is not None and running_mean.dtype != input.dtype
    ):  # its 16-bit form wants float32 parameters
        weight, bias = (None if t is None else t.to(running_mean.dtype) for t in (weight, bias))
    if momentum is None:
        momentum = 0.0 if batches is None else 1.0 / (batches + 1).to(wide_dtype(batches.device))
    used = (running_mean, running_var) if mode.moves or not mode.measures else (None, None)
    if isinstance(momentum, Tensor) and mode.moves:
        # torch's operator takes a number: read the batch off it, and move by hand
        found = [None if t is None else torch.zeros_like(t) for t in used]
        y = F.batch_norm(input, *found, weight, bias, mode.measures, 1.0, settings.eps)
        for old, new in zip(used, found, strict=True):
            if old is not None and new is not None:
                old.copy_(running_update(old, new, momentum))
    else:
        number = 0.0 if isinstance(momentum, Tensor) else momentum
        y = F.batch_norm(input, *used, weight, bias, mode.measures, number, settings.eps)
    return _behind(y, residual, settings.activation)


def _behind(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    y = y if residual is None else y + residual
    return y if activation is None else ACTIVATIONS[activation].value(y)
