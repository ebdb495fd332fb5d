"""One call from its checks to its running statistics: the mode that it is in, and the path that it needs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm.errors import OptionError
from batchnorm.kernels.choose import engine
from batchnorm.kernels.interface import RunningStatistics, wide_dtype
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.synced import Synced

from . import checks, compiled, composite, halves, operators
from .collectives import operations as collectives
from .composite import Normalized
from .exported import behind, stock
from .plan import Plan
from .policy_step import Choice, known_to, samples_of
from .running_stats import check_finite, move
from .settings import Settings, Tracked
from .tracing import is_exporting, is_recomputed, is_transforming


class Mode(NamedTuple):
    """What a call does with its batch.

    Attributes:
        measures: it takes moments; if not, it normalizes by the running statistics.
        moves: the running statistics then move.
        needs_two: one value per channel is refused.
        ranks: who shares the moments; None = nobody.
        small_batch_fallback: groups of fewer than two values are normalized by the running statistics.
    """

    measures: bool
    moves: bool
    needs_two: bool
    ranks: collectives.Ranks | None = None
    small_batch_fallback: bool = False


# The mode of most calls, by whether statistics are tracked.
_USUAL = {tracked: Mode(measures=True, moves=tracked, needs_two=True) for tracked in (False, True)}
_GIVEN = Mode(measures=False, moves=False, needs_two=False)


def mode_of(input: Tensor, tracked: Tracked, settings: Settings, mask: Tensor | None) -> Mode:
    """Return what a call does with its batch."""
    policy, training = settings.statistics, settings.training
    is_tracked = tracked.mean is not None or tracked.var is not None or tracked.batches is not None
    if type(policy) is Batch and settings.small_batch == "raise":  # most calls, in a hurry
        return _USUAL[is_tracked and not is_recomputed()] if training else _GIVEN
    if type(policy) is not Batch:
        checks.check_policy(policy, tracked.mean is not None and tracked.var is not None)
    if not policy.measures(training):
        return _GIVEN
    moves = is_tracked and policy.moves(training) and not is_recomputed()
    ranks = None
    if isinstance(policy, Synced) and training:
        ranks = collectives.sharing_ranks(policy.group, policy.timeout)
    needs_two = training and ranks is None
    small_batch_fallback = False
    if (
        needs_two
        and settings.small_batch == "running"
        and tracked.mean is not None
        and tracked.var is not None
    ):
        is_traced = bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call]  # for other sizes, too
        small_batch_fallback = (
            mask is not None or is_traced or _smallest_group(input, policy.groups(training)) == 1
        )
        needs_two = False
    return Mode(True, moves, needs_two, ranks, small_batch_fallback)


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
    if input.layout is not torch.strided and checks.is_mkldnn(input):
        return _of_mkldnn(input, tracked, weight, bias, residual, mask, settings)
    mode, exporting = mode_of(input, tracked, settings, mask), is_exporting()
    check(input, tracked, weight, bias, residual, mask, settings, mode, exporting=exporting)
    if exporting and tracked.pool is not None and mode.moves:
        raise OptionError(
            "batchnorm.accumulate cannot be exported in training: export outside of the block, or in "
            "evaluation (model.eval())"
        )
    if exporting and is_exported_as_stock(settings, mode, mask):
        y = stock(input, tracked, weight, bias, residual, settings, measures=mode.measures, moves=mode.moves)
        if mode.moves and tracked.batches is not None:
            tracked.batches.add_(1)
        return y
    running = _for_kernels(tracked, settings) if mode.moves else None
    y, batch, has_moved = normalize(
        input, tracked, weight, bias, residual, mask, settings, mode, running, exporting=exporting
    )
    if mode.moves and not has_moved and batch is not None:
        skip = settings.nonfinite == "skip"
        if tracked.pool is not None:
            tracked.pool.add(batch, skip=skip, tracked=tracked)
        else:
            move(tracked, batch, sequential=settings.statistics.is_sequential, skip=skip)
    return y


def _of_mkldnn(
    input: Tensor,
    tracked: Tracked,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
) -> Tensor:
    """As `tracked_batch_norm`, for an input in MKL-DNN's own layout, which the output then has too."""
    if residual is not None and checks.is_mkldnn(residual):
        residual = residual.to_dense()
    y = tracked_batch_norm(input.to_dense(), tracked, weight, bias, residual, mask, settings)
    return y.to_mkldnn()


def _for_kernels(tracked: Tracked, settings: Settings) -> RunningStatistics | None:
    """Return what a kernel can move along the way, None where the statistics move apart from it."""
    mean, var, batches, momentum, skipped, _, pool = tracked
    nonfinite = settings.nonfinite
    if pool is not None or nonfinite == "raise" or momentum is None or isinstance(momentum, Tensor):
        return None
    if nonfinite == "propagate":
        skipped = None
    elif skipped is None:
        return None
    return RunningStatistics(mean, var, batches, momentum, skipped, settings.statistics.is_sequential)


def check(
    input: Tensor,
    tracked: Tracked,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
    mode: Mode,
    *,
    exporting: bool,
) -> None:
    """Raise unless a call can be computed; nothing has changed then."""
    checks.check_activation(settings.activation)
    policy = settings.statistics
    size = policy.groups(settings.training) if mode.needs_two and type(policy) is not Batch else None
    if (
        not exporting
        and mask is None
        and size is None
        and checks.is_usual(
            input, (tracked.mean, tracked.var, weight, bias), residual, mode.measures, settings.eps
        )
    ):
        return
    checks.check_eps(settings.eps, settings.training)
    if exporting and torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return  # sizes are recorded values there, and torch's own operator checks them
    checks.check_input(input)
    if mode.needs_two and checks.is_single(input):
        raise checks.too_few(input, _remedies(tracked, settings))
    if size is not None:
        checks.check_groups(input, size, _smallest_group(input, size), _remedies(tracked, settings))
    checks.check_running(tracked.mean, tracked.var, input, given=not mode.measures)
    checks.check_parameter("weight", weight, input)
    checks.check_parameter("bias", bias, input)
    checks.check_residual(residual, input)
    checks.check_mask(mask, input)


def _remedies(tracked: Tracked, settings: Settings) -> str:
    """Return what helps against one value per channel: what a call of this layer, or function, can do."""
    larger = "use a larger batch, drop the last batch of one (DataLoader(drop_last=True)), "
    is_tracked = tracked.mean is not None and tracked.var is not None
    if settings.label is None:
        return f"{larger}or pass training=False" if is_tracked else f"{larger}or pass running statistics"
    if is_tracked:
        return f'{larger}give the layer small_batch="running", or call .eval() on it'
    return f'{larger}or make the layer with track_running_stats=True and small_batch="running"'


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
    *,
    exporting: bool,
) -> Normalized:
    """Take the path that this call needs: compiled, transformed, or eager; only this one moves `running`."""
    if residual is not None:
        input = input.to(torch.promote_types(input.dtype, residual.dtype))
    if input.dim() < 2:
        return Normalized(behind(input.clone(), residual, settings.activation), None)
    plan = _plan(input, tracked, mask, settings, mode, exporting=exporting)
    strict = settings.nonfinite == "raise" and settings.training and mode.measures
    if exporting or is_transforming():
        found = composite.normalize(input, weight, bias, residual, plan, exporting=exporting)
        if strict and found.batch is not None:
            check_finite(found.batch.mean.detach(), found.batch.m2.detach())
        return found
    if torch.compiler.is_compiling():
        return compiled.apply(input, weight, bias, residual, plan, strict=strict)
    if plan.choice is not None:
        return halves.apply(input, weight, bias, residual, plan, strict=strict)
    return operators.apply(input, weight, bias, residual, plan, running, strict=strict)


def _plan(
    input: Tensor, tracked: Tracked, mask: Tensor | None, settings: Settings, mode: Mode, *, exporting: bool
) -> Plan:
    policy, training, eps = settings.statistics, settings.training, settings.eps
    if not mode.measures:
        assert tracked.mean is not None
        assert tracked.var is not None
        given = _given(tracked.mean, tracked.var, eps, input, exporting=exporting)
        return Plan(eps, settings.activation, mask, None, given)
    if type(policy) is Batch and not mode.small_batch_fallback:  # most calls
        return Plan(eps, settings.activation, mask)
    size = policy.groups(training)
    if mode.ranks is None and policy.is_plain(training) and not mode.small_batch_fallback:
        return Plan(eps, settings.activation, mask, size)
    known = known_to(
        tracked.mean, tracked.var, tracked.batches, samples_of(input, mask), eps, wide_dtype(input.device)
    )
    label, ranks = "batch_norm", mode.ranks
    if ranks is not None:
        label = label if settings.label is None else settings.label()
        ranks = collectives.numbered(ranks, input.device)
    choice = Choice(policy, training, known, ranks, label, mode.small_batch_fallback, tracked.memory)
    return Plan(eps, settings.activation, mask, size, None, choice)


def _given(
    running_mean: Tensor, running_var: Tensor, eps: float, input: Tensor, *, exporting: bool
) -> tuple[Tensor, Tensor]:
    """Return mean and rstd, `[1, C]`; copies, so that autograd never holds a buffer that will move."""
    if not (exporting or is_transforming() or torch.compiler.is_compiling()):
        found = engine(input).given(running_mean, running_var, eps)
        if found is not None:
            return found
    wide = wide_dtype(running_mean.device)
    mean = running_mean.detach().to(wide, copy=True)
    return mean.unsqueeze(0), (running_var.detach().to(wide) + eps).rsqrt().unsqueeze(0)


def is_exported_as_stock(settings: Settings, mode: Mode, mask: Tensor | None) -> bool:
    """Whether a call that is being exported is one of torch's own operator."""
    if mode.ranks is not None:
        raise OptionError(
            "statistics of several ranks cannot be exported: export in evaluation (model.eval())"
        )
    policy, training = settings.statistics, settings.training
    if training and mode.measures and settings.nonfinite == "raise":
        raise OptionError(
            'nonfinite="raise" cannot be exported in training, as no graph raises: export in evaluation '
            '(model.eval()), or set layer.nonfinite = "skip" or "propagate"'
        )
    is_plain = policy.is_plain(training) and policy.groups(training) is None and not mode.small_batch_fallback
    is_plain = is_plain and not (mode.moves and settings.nonfinite == "skip")
    return mask is None and (not mode.measures or is_plain)
