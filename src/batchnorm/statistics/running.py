"""Statistics that are given, not computed from the batch: inference, and frozen layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .policy import Policy

Array = Any


@dataclass(frozen=True)
class Running(Policy):
    """The running statistics, in training too: a frozen layer, and it stays one after `train()`.

        y = weight * (x - running_mean) / sqrt(running_var + eps) + bias    in training and in evaluation

    Nothing moves: neither running statistic, nor the count of batches. Gradients flow to x, weight and bias;
    mean and var are constants. A call in training costs what one in evaluation does.

    Source: Ren et al. 2015, arXiv:1506.01497, and the detectors after it, which train on few images per batch
    with the statistics of the classifier that they start from.
    """

    name = "running"
    needs_running = True

    def takes_batch(self, training: bool) -> bool:  # noqa: ARG002
        """Never."""
        return False


def gradient_coefficients(weight: Array, rstd: Array) -> tuple[Array, Array, Array]:
    """Return a, b, c of dx = a dy' + b x̂ + c, where mean and var do not depend on x.

    dx = weight * rstd * dy'
    """
    a = weight * rstd
    return a, a * 0, a * 0
