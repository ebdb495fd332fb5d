"""Runs one call, from its checks to its running statistics, on the path that it needs.

a layer's plain call, on a CPU    `autograd.py`: prepared; nothing watches, transforms, compiles or exports it
exported or traced                `exported.py`: torch's own operators
under a transform                 `composite.py`: plain differentiable operations
under torch.compile               `compiled.py`: one operator each way; `compiled_kernels.py` on GPUs;
                                  `compiled_policy.py`: by a policy
any other                         `autograd.py`: an autograd Function over the kernels
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm.errors import OptionError
from batchnorm.kernels import choose
from batchnorm.kernels.eager import constants
from batchnorm.kernels.interface import RunningState, wide_dtype
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy_config import check_policy
from batchnorm.statistics.synced import Synced

from . import autograd, checks, compiled, compiled_policy, composite
from .call import Call, Normalized
from .collectives import operations as collectives
from .exported import behind, stock
from .moments import check_finite
from .policy_step import PolicyStep, known_to, samples_of
from .running_stats import move
from .tracing import is_exporting, is_recomputed, is_transforming, is_watched, may_hide_addresses

if TYPE_CHECKING:
    from batchnorm.kernels.cpu.plain_call import PlainCall


def batch_norm(call: Call) -> Tensor:
    """Normalize, and move the running statistics in place: last, after everything that can fail."""
    running = call.running
    tensors = (call.x, running.mean, running.var, call.weight, call.bias, call.residual, call.mask)
    if has_torch_function(tensors):
        found: Tensor = handle_torch_function(batch_norm, tensors, call)
        return found
    if call.x.layout is not torch.strided and checks.is_mkldnn(call.x):
        return _of_mkldnn(call)
    mode, exporting = mode_of(call), is_exporting()
    check(call, mode, exporting=exporting)
    checks.check_constant(running.mean, running.var)
    if exporting and is_exported_as_stock(call, mode):
        y = stock(call, measures=mode.measures, moves=mode.moves)
        if mode.moves and running.batches is not None:
            running.batches.add_(1)
        return y
    y, batch, has_moved = normalize(
        call, mode, _for_kernels(call) if mode.moves else None, exporting=exporting
    )
    if mode.moves and not has_moved and batch is not None:
        skip = call.nonfinite == "skip"
        if running.accumulator is not None:
            running.accumulator.add(batch, skip=skip)
        else:
            move(running, batch, skip=skip)
    return y


def may_repeat_plain() -> bool:
    """Whether a layer may run its plain call again: no torch mode is active, and no other engine is wanted.

    It leaves out transforms of `torch.func`, under which tensors show no address: a plain call then raises,
    and the layer takes another path.
    """
    return not is_watched() and choose.forced() is None


def plain_call(call: Call) -> PlainCall | None:
    """Prepare a plain call; None where the call is not plain, or no kernel takes the layout of its input."""
    if is_watched() or may_hide_addresses(call.x) or not choose.is_default() or not checks.is_plain(call):
        return None
    mean, var, batches, momentum, *_ = call.running
    running: Any = (mean, var, batches)
    plain = choose.load_plain_call()(
        call.x,
        call.weight,  # type: ignore[arg-type]
        call.bias,  # type: ignore[arg-type]
        running,
        training=call.training,
        eps=call.eps,
        momentum=momentum,  # type: ignore[arg-type]
        activation=call.activation,
    )
    fits = plain.is_dense and (call.residual is None or plain.is_alike(call.residual))
    return plain if fits else None


def _of_mkldnn(call: Call) -> Tensor:
    """Normalize an input in MKL-DNN's own layout, which the output then has too."""
    residual = call.residual
    if residual is not None and checks.is_mkldnn(residual):
        residual = residual.to_dense()
    return batch_norm(call._replace(x=call.x.to_dense(), residual=residual)).to_mkldnn()


class Mode(NamedTuple):
    """The use that a call makes of its batch.

    Attributes:
        measures: whether it takes moments; if not, it normalizes by the running statistics.
        moves: whether the running statistics then move.
        needs_two: whether one value per channel is refused.
        ranks: the ranks that share moments; None = each has its own.
        small_batch_fallback: whether the running statistics normalize groups of fewer than two values.
    """

    measures: bool
    moves: bool
    needs_two: bool
    ranks: collectives.Ranks | None
    small_batch_fallback: bool


def mode_of(call: Call) -> Mode:
    """Return what a call does with its batch."""
    policy, training, running = call.policy, call.training, call.running
    if type(policy) is not Batch:
        check_policy(policy, running.is_complete)
    if not policy.measures(training):
        return Mode(measures=False, moves=False, needs_two=False, ranks=None, small_batch_fallback=False)
    moves = running.is_tracked and policy.moves(training) and not is_recomputed()
    ranks = None
    if isinstance(policy, Synced) and training:
        ranks = collectives.sharing_ranks(policy.group, policy.timeout)
    needs_two = training and ranks is None
    small_batch_fallback = False
    if needs_two and call.small_batch == "running" and running.is_complete:
        is_traced = bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call]  # the graph serves other sizes, too
        small_batch_fallback = call.mask is not None or is_traced or _smallest_group(call) == 1
        needs_two = False
    return Mode(True, moves, needs_two, ranks, small_batch_fallback)


def _smallest_group(call: Call) -> int:
    """Return the number of values per channel of the smallest group of samples."""
    input, size = call.x, call.group_size
    samples = input.shape[0] if input.dim() > 1 else 0
    if size is not None and samples:
        samples = min(size, samples % size or size)
    return samples * math.prod(input.shape[2:])


def _for_kernels(call: Call) -> RunningState | None:
    """Return the running statistics that a kernel may move in its launch; None where they move afterwards."""
    running, nonfinite = call.running, call.nonfinite
    is_apart = running.accumulator is not None or nonfinite == "raise" or running.warm_start
    return None if is_apart or (nonfinite == "skip" and running.skipped is None) else running


def check(call: Call, mode: Mode, *, exporting: bool) -> None:
    """Raise an error, before anything has changed, unless a call can be computed."""
    checks.check_activation(call.activation)
    input, running = call.x, call.running
    checks.check_eps(call.eps, call.training)
    if exporting and torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return  # sizes are recorded values there, and torch's own operator checks them
    checks.check_input(input)
    if mode.needs_two and checks.is_single(input):
        raise checks.too_few(input, _remedies(call))
    if mode.needs_two and call.group_size is not None:
        checks.check_groups(input, call.group_size, _smallest_group(call), _remedies(call))
    checks.check_running(running.mean, running.var, input, given=not mode.measures)
    checks.check_parameter("weight", call.weight, input)
    checks.check_parameter("bias", call.bias, input)
    checks.check_residual(call.residual, input)
    checks.check_mask(call.mask, input)


def _remedies(call: Call) -> str:
    """Return the remedies for one value per channel, as an error names them: of a layer, or of a function."""
    larger = "use a larger batch, drop the last batch of one (DataLoader(drop_last=True)), "
    is_tracked = call.running.is_complete
    if call.label is None:
        return f"{larger}or pass training=False" if is_tracked else f"{larger}or pass running statistics"
    if is_tracked:
        return f'{larger}give the layer small_batch="running", or call .eval() on it'
    return f'{larger}or make the layer with track_running_stats=True and small_batch="running"'


def normalize(call: Call, mode: Mode, running: RunningState | None = None, *, exporting: bool) -> Normalized:
    """Normalize on the path that the call needs; only the kernels of an eager call move `running`."""
    if not (mode.measures and call.policy.is_shuffled and call.group_size is not None):
        return _normalize(call, mode, running, exporting=exporting)
    order = torch.randperm(call.x.shape[0], device=call.x.device)
    residual, mask = (None if t is None else t[order] for t in (call.residual, call.mask))
    shuffled = call._replace(x=call.x[order], residual=residual, mask=mask)
    found = _normalize(shuffled, mode, running, exporting=exporting)
    return found._replace(y=found.y[torch.argsort(order)])


def _normalize(call: Call, mode: Mode, running: RunningState | None, *, exporting: bool) -> Normalized:
    """As `normalize`, of groups of consecutive samples."""
    if call.residual is not None:
        dtype = torch.promote_types(call.x.dtype, call.residual.dtype)
        if dtype != call.x.dtype:
            call = call._replace(x=call.x.to(dtype))
    if call.x.dim() < 2:
        return Normalized(behind(call.x.clone(), call.residual, call.activation), None)
    step = _policy_step(call, mode) if mode.measures else None
    strict = call.nonfinite == "raise" and call.training and mode.measures
    if exporting or is_transforming():
        found = composite.normalize(call, _given(call, mode), step, exporting=exporting)
        if strict and found.batch is not None:
            _check_within_transform(found.batch)
        return found
    if torch.compiler.is_compiling():
        if step is not None:
            return compiled_policy.normalize(call, step, strict=strict)
        visible = None if strict else _visible_operator(call)
        return compiled.normalize(call, _given(call, mode), strict=strict, visible=visible)
    if step is not None:
        return autograd.normalize_by_policy(call, step, strict=strict)
    return autograd.normalize(call, running, constant=not mode.measures, strict=strict)


def _check_within_transform(batch: PooledMoments) -> None:
    """Raise as `check_finite`; OptionError where a transform of torch.func hides the values."""
    try:
        check_finite(PooledMoments(batch.count, batch.mean.detach(), batch.m2.detach()))
    except RuntimeError as error:
        if not is_transforming():
            raise
        raise OptionError(
            'nonfinite="raise" cannot look at values under torch.func.vmap: set layer.nonfinite = "skip" or '
            '"propagate" there'
        ) from error


def _visible_operator(call: Call) -> Callable[..., tuple[Tensor, ...]] | None:
    """Return the operator that `torch.compile` looks into, if there is one for this call."""
    if call.mask is not None or call.x.is_cpu:
        return None
    from . import compiled_kernels  # slow to import

    return compiled_kernels.normalize if compiled_kernels.can_see(call) else None


def _given(call: Call, mode: Mode) -> tuple[Tensor, Tensor] | None:
    """Return mean and rstd of the running statistics, where a call normalizes by these."""
    if mode.measures:
        return None
    mean, var = call.running.mean, call.running.var
    assert mean is not None
    assert var is not None
    return constants(mean, var, call.eps)


def _policy_step(call: Call, mode: Mode) -> PolicyStep | None:
    """Return the policy's step between moments and normalization; None where the policy chooses nothing."""
    policy, training, running = call.policy, call.training, call.running
    if mode.ranks is None and policy.is_plain(training) and not mode.small_batch_fallback:
        return None
    samples, wide = samples_of(call.x, call.mask), wide_dtype(call.x.device)
    known = known_to(running.mean, running.var, running.batches, samples, call.eps, wide)
    label, ranks = "batch_norm", mode.ranks
    if ranks is not None:
        label = label if call.label is None else call.label()
        ranks = collectives.numbered(ranks, call.x.device)
    return PolicyStep(policy, training, known, ranks, label, mode.small_batch_fallback, running.memory)


def is_exported_as_stock(call: Call, mode: Mode) -> bool:
    """Whether the export of a call records torch's own operator."""
    if mode.moves and call.running.accumulator is not None:
        raise OptionError(
            "batchnorm.accumulate cannot be exported in training: export outside of the block, or in "
            "evaluation (model.eval())"
        )
    if mode.ranks is not None:
        raise OptionError(
            "statistics of several ranks cannot be exported: export in evaluation (model.eval())"
        )
    policy, training = call.policy, call.training
    if training and mode.measures and call.nonfinite == "raise":
        raise OptionError(
            'nonfinite="raise" cannot be exported in training, as no graph raises: export in evaluation '
            '(model.eval()), or set layer.nonfinite = "skip" or "propagate"'
        )
    is_plain = policy.is_plain(training) and call.group_size is None and not mode.small_batch_fallback
    is_plain = is_plain and not (mode.moves and (call.nonfinite == "skip" or call.running.warm_start))
    return call.mask is None and (not mode.measures or is_plain)
