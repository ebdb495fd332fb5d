"""The mini-batch's own statistics, and how they move the running ones.

Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .policy import Policy

# An array of any framework, `[C]`, wide; or a scalar that broadcasts against one.
Array = Any


@dataclass(frozen=True)
class Batch(Policy):
    """The mini-batch's own statistics in training, the running ones in evaluation: the stock layer.

        training:    mean = Σ x / n,  var = Σ (x - mean)² / n;  the running ones move
        evaluation:  mean = running_mean,  var = running_var;  nothing moves

    In training, gradients flow through mean and var too.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """

    name = "batch"


def running_update(running: Array, batch: Array, momentum: Array) -> Array:
    """Return the moved running statistic, in torch's convention.

        running = (1 - momentum) * running + momentum * batch

    The batch variance that enters is the unbiased one, m2 / (n - 1). A cumulative average over batches has
    momentum = 1 / (number of batches so far).
    """
    return (1 - momentum) * running + momentum * batch
