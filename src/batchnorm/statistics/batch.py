"""Normalizes by the mini-batch's own statistics, and defines how these move the running ones."""

from __future__ import annotations

from dataclasses import dataclass

from .moments import A
from .policy import Policy


@dataclass(frozen=True)
class Batch(Policy):
    """Uses the mini-batch's own statistics in training and the running ones in evaluation, as stock layers.

        training:    mean = Σ x / n,  var = Σ (x - mean)² / n;  the running statistics move
        evaluation:  mean = running_mean,  var = running_var;  nothing moves

    In training, gradients flow through mean and var too.

    Example:
        >>> norm = batchnorm.BatchNorm2d(16, statistics=batchnorm.Batch())  # the default
        >>> y = norm(torch.randn(32, 16, 8, 8))

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """

    name = "batch"


def running_update(running: A, batch: A, momentum: A | float) -> A:
    """Return the moved running statistic, in torch's convention.

        running = (1 - momentum) * running + momentum * batch

    The batch variance that enters is the unbiased one, m2 / (n - 1). A cumulative average over batches has
    momentum = 1 / (number of batches so far).
    """
    return (1 - momentum) * running + momentum * batch
