"""Statistics that are given, not computed from the batch: frozen layers."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import Policy


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

    def measures(self, training: bool) -> bool:  # noqa: ARG002
        """Never."""
        return False
