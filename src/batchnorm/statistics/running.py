"""Normalizes by the running statistics always: frozen layers."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import Policy


@dataclass(frozen=True)
class Running(Policy):
    """Uses the running statistics in training too: the layer is frozen, and `train()` does not change that.

        y = weight * (x - running_mean) / sqrt(running_var + eps) + bias    in training and in evaluation

    Nothing moves: neither running statistic, nor the count of batches. Gradients flow to x, weight and bias;
    mean and var are constants. A call in training costs as much as one in evaluation.

    Raises:
        OptionError: (a ValueError; by the layer that gets the policy) it tracks no running statistics.

    Example:
        >>> norm = batchnorm.BatchNorm2d(16, statistics=batchnorm.Running())
        >>> before = norm.running_mean.clone()
        >>> y = norm.train()(torch.randn(8, 16, 4, 4))
        >>> torch.equal(norm.running_mean, before)
        True

    Source: Ren et al. 2015, arXiv:1506.01497, and later detectors, which train on few images per batch with
    the statistics of the classifier that they start from.
    """

    name = "running"
    needs_running = True

    def measures(self, training: bool) -> bool:  # noqa: ARG002
        """Never."""
        return False
