"""What one call is told besides its tensors: the options of a layer, and the running statistics it moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from batchnorm.statistics.batch import Batch
from batchnorm.statistics.policy import Policy


class Settings(NamedTuple):
    """The options of a call.

    Attributes:
        training: the mode.
        eps: added to var.
        activation: its name, or None.
        statistics: the policy.
        nonfinite: "propagate", "skip" or "raise": what a batch with inf or NaN does to running statistics.
        small_batch: "raise" or "running": what one value per channel is normalized by.
        label: returns how other ranks know the layer.
    """

    training: bool
    eps: float
    activation: str | None = None
    statistics: Policy = Batch()
    nonfinite: str = "propagate"
    small_batch: str = "raise"
    label: Callable[[], str] | None = None


class Tracked(NamedTuple):
    """The running statistics of a layer, or none.

    Attributes:
        mean, var: `[C]`.
        batches: how many have moved them, an integer tensor of one value.
        momentum: a batch's fraction, 0..1, a number or a tensor of one; None = 1 / (number of batches).
        skipped: how many were skipped, an integer tensor of one value.
        memory: what they were in passes that may come again (`contexts/recomputed.py`).
        pool: takes the batch's moments instead, until several are together (`accumulate.py`).
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    momentum: float | Tensor | None = 0.1
    skipped: Tensor | None = None
    memory: Any = None
    pool: Any = None
