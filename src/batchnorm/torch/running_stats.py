"""Moves the running statistics of a layer where no kernel has done so in its launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import OptionError
from batchnorm.kernels.interface import RunningState
from batchnorm.statistics.batch import running_update
from batchnorm.statistics.moments import PooledMoments

from .moments import is_finite, pooled_groups
from .tracing import is_transforming, is_watched


class Moved(NamedTuple):
    """The running statistics after a batch, wide, and what it adds to the counts."""

    mean: Tensor | None
    var: Tensor | None
    batches: int | Tensor
    skipped: Tensor | None


def moved(running: RunningState, batch: PooledMoments, *, is_counted: Tensor | None = None) -> Moved:
    """Return the running statistics after a batch; nothing is written.

        running = (1 - momentum) * running + momentum * batch,    with var = m2 / (n - 1)

    Fewer than two values, which have no variance, leave them as they are. With `running.warm_start`, momentum
    is 1 in channels that have the initial values.

    Args:
        running: running statistics, or None each.
        batch: its moments, `[G, C]`.
        is_counted: whether the batch counts, a bool tensor of one value; if not, it leaves all as it is, and
            counts as skipped. None = it counts.
    """
    batch = PooledMoments(batch.count, batch.mean.detach(), batch.m2.detach())
    parts = [pooled_groups(batch)]
    if running.sequential:
        counts = batch.count if isinstance(batch.count, Tensor) else [batch.count] * len(batch.mean)
        parts = [PooledMoments(*part) for part in zip(counts, batch.mean, batch.m2, strict=True)]
    mean, var = (None if t is None else t.detach().to(batch.mean.dtype) for t in (running.mean, running.var))
    for number, part in enumerate(parts):
        momentum = _momentum(running, number, batch.mean)
        if running.warm_start and mean is not None and var is not None:
            momentum = torch.where(is_initial(mean, var), torch.ones_like(batch.mean[0]), momentum)
        mean = _update(mean, part.mean, part.count, momentum)
        var = _update(var, part.m2, part.count, momentum, corrected=True)
    if is_counted is None:
        return Moved(mean, var, len(parts), None)
    mean, var = (
        None if old is None or new is None else torch.where(is_counted, new, old.detach().to(new.dtype))
        for old, new in ((running.mean, mean), (running.var, var))
    )
    return Moved(mean, var, is_counted * len(parts), ~is_counted)


def _update(
    old: Tensor | None,
    new: Tensor,
    count: float | Tensor,
    momentum: float | Tensor,
    *,
    corrected: bool = False,
) -> Tensor | None:
    """Return a moved running statistic; `corrected`: `new` is a sum, ÷ (count - 1)."""
    if old is None:
        return None
    if not isinstance(count, Tensor):  # known on the host
        return running_update(old, new / (count - 1) if corrected else new, momentum) if count >= 2 else old
    new = new / (count - 1).clamp(min=1) if corrected else new
    return torch.where(count >= 2, running_update(old, new, momentum), old)


def _momentum(running: RunningState, number: int, like: Tensor) -> float | Tensor:
    if isinstance(running.momentum, Tensor):
        return running.momentum.to(like.dtype)  # before 1 - momentum, which float32 would round
    if running.momentum is not None:
        return running.momentum
    if running.batches is None:
        return 0.0  # as torch.nn does, which then has nothing to average over
    return 1.0 / (running.batches + (number + 1)).to(like.dtype)  # the host does not wait for it


def is_initial(mean: Tensor, var: Tensor) -> Tensor:
    """Return which channels have the initial running statistics, mean 0 and var 1, `[C]` bool."""
    return (mean == 0) & (var == 1)


def may_begin(mean: Tensor | None, var: Tensor | None) -> bool:
    """Whether the next batch may replace running statistics, of a layer with `warm_start`.

    The host reads them where that takes no time: on a CPU. Elsewhere, and where torch only records the call,
    operations on tensors decide.
    """
    if mean is None or var is None:
        return False
    if is_watched() or is_transforming() or not (type(mean) is type(var) is Tensor and mean.is_cpu):
        return True
    if int(torch.count_nonzero(mean)) == mean.numel():  # a fifth of the time of `all`
        return False
    return bool(is_initial(mean, var).any())


def _check_writable(running: RunningState) -> None:
    """Raise OptionError for tensors of `torch.inference_mode`: torch writes to them, then raises."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    for name in ("mean", "var", "batches", "skipped"):
        tensor = getattr(running, name)
        if tensor is not None and tensor.is_inference():
            raise OptionError(
                f"running statistics ({name}) were made under torch.inference_mode(), and cannot move "
                "outside of it: make or load the model outside, or give it clones of its buffers"
            )


def move(running: RunningState, batch: PooledMoments, *, skip: bool = False) -> None:
    """Move the running statistics and the counts in place; `skip`: unless the batch has inf or NaN."""
    write(running, moved(running, batch, is_counted=is_finite(batch) if skip else None))


def write(running: RunningState, after: Moved) -> None:
    """Write the running statistics, and then the counts, in place: all of them, or none on an error."""
    _check_writable(running)
    changes: list[tuple[Any, Tensor | None, Any]] = [
        (Tensor.copy_, running.mean, after.mean),
        (Tensor.copy_, running.var, after.var),
        (Tensor.add_, running.batches, after.batches),
        (Tensor.add_, running.skipped, after.skipped),
    ]
    written: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for change, old, new in changes:
                if old is not None and new is not None:
                    before = old.clone()
                    change(old, new)
                    written.append((old, before))
    except RuntimeError as error:
        with torch.no_grad():
            for old, before in written:
                old.copy_(before)
        if not is_transforming():
            raise
        raise OptionError(
            "torch.func cannot write to running statistics that it does not transform: pass the buffers as "
            "arguments (functional_call), use functional.pure_batch_norm, or track_running_stats=False"
        ) from error
