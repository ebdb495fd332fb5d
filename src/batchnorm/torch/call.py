"""Defines the record of a call (its tensors, running statistics and options) and that of its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.statistics.batch import Batch
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import Policy

HALVES = (torch.float16, torch.bfloat16)


class RunningState(NamedTuple):
    """Running statistics of a layer, or none; `kernels.interface.RunningState` says how they move.

    Attributes:
        mean, var: `[C]`; None = not tracked.
        batches: how many batches have moved them, an integer tensor of one value.
        momentum: a batch's fraction, 0..1, a number or a tensor of one; None = 1 / (number of batches).
        skipped: how many batches with inf or NaN were skipped, an integer tensor of one value; None = such
            batches are not skipped.
        sequential: each group of samples moves them as a batch of its own.
        memory: remembers them for forwards that checkpointing may recompute (`contexts/checkpointing.py`).
        accumulator: collects the moments of several batches, which move them as one
            (`contexts/accumulation.py`).
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    momentum: float | Tensor | None = 0.1
    skipped: Tensor | None = None
    sequential: bool = False
    memory: Any = None
    accumulator: Any = None

    @property
    def is_tracked(self) -> bool:
        """Whether there is a running statistic or a count that a batch moves."""
        return self.mean is not None or self.var is not None or self.batches is not None

    @property
    def is_complete(self) -> bool:
        """Whether there is a mean and a variance, to normalize by."""
        return self.mean is not None and self.var is not None


NO_RUNNING_STATE = RunningState()
_BATCH = Batch()


class Call(NamedTuple):
    """A call of a layer or function, filled once and handed down to the engine.

    Attributes:
        x: input `[N, C, *S]`.
        weight, bias: `[C]`; None = 1 and 0.
        residual: `[N, C, *S]`, added before the activation; None = 0.
        mask: `[N, *S]` bool, True = the value counts; None = all do.
        activation: its name; None = identity.
        eps: added to var.
        group_size: samples that share statistics in this call; None = all.
        running: running statistics.
        policy: which statistics the call normalizes by.
        training: the mode.
        nonfinite: "propagate", "skip" or "raise": what a batch with inf or NaN does in training.
        small_batch: "raise" or "running": what one value per channel is normalized by in training.
        label: returns the name by which other ranks know the layer; None for a function.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    mask: Tensor | None = None
    activation: str | None = None
    eps: float = 1e-5
    group_size: int | None = None
    running: RunningState = NO_RUNNING_STATE
    policy: Policy = _BATCH
    training: bool = True
    nonfinite: str = "propagate"
    small_batch: str = "raise"
    label: Callable[[], str] | None = None


class Normalized(NamedTuple):
    """Output, and the batch statistics where they were computed.

    Attributes:
        y: `[N, C, *S]`, in the dtype of x.
        batch: moments of each group, `[G, C]`, wide; of all ranks, where these share them; None where the
            statistics were given.
        moved: whether the running statistics have moved already.
    """

    y: Tensor
    batch: PooledMoments | None
    moved: bool = False


def cleared(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return values `[N, C, *S]` with 0 where the mask leaves them out, whatever was there."""
    return values if mask is None else torch.where(mask.unsqueeze(1), values, 0.0).to(values.dtype)
