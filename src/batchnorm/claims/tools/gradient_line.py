"""Measures the loss along its gradient: how far it can be followed before it changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.studies.learner_torch import statistics_kept


@dataclass(frozen=True)
class GradientLine:
    """The loss at the end of steps of several lengths along the gradient, all from one point.

    Attributes:
        losses: after each step.
        distances: ‖∇f(w − ηg) − g‖ for each step length η, where g = ∇f(w).
        smoothness: the largest ‖∇f(w − ηg) − g‖ / (η ‖g‖): how much the gradient changes per distance.
    """

    losses: tuple[float, ...]
    distances: tuple[float, ...]
    smoothness: float

    @property
    def spread(self) -> float:
        """Largest less smallest loss."""
        return max(self.losses) - min(self.losses)


def along_gradient(model: nn.Module, loss: Callable[[], Tensor], lengths: Sequence[float]) -> GradientLine:
    """Measures the loss and its gradient after steps of several lengths along the gradient.

        w(η) = w − η ∇f(w)

    Parameters, gradients and running statistics of the model are as before in the end, also after an error.

    Args:
        model: with parameters to move; in the mode that it is in.
        loss: computes the loss, of the same batch in every call.
        lengths: step lengths η, as learning rates.

    Returns:
        The losses, and how far the gradient moved.

    Example:
        >>> line = along_gradient(model, lambda: cross_entropy(model(x), y), (0.05, 0.1, 0.2, 0.4))
        >>> line.spread, line.smoothness

    Source: Santurkar et al. 2018, arXiv:1805.11604, section 3.1 and figure 4.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    losses, distances, smoothness = [], [], 0.0
    with statistics_kept(model):
        try:
            start = torch.autograd.grad(loss(), parameters)
            size = _norm(start)
            for length in lengths:
                with torch.no_grad():
                    for parameter, value, gradient in zip(parameters, before, start, strict=True):
                        parameter.copy_(value - length * gradient)
                there = loss()
                gradients = torch.autograd.grad(there, parameters)
                distance = _norm([a - b for a, b in zip(gradients, start, strict=True)])
                losses.append(there.item())
                distances.append(distance)
                smoothness = max(smoothness, distance / (length * size) if size else 0.0)
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)
    return GradientLine(tuple(losses), tuple(distances), smoothness)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt())
