"""A training step of a network in its two halves: forward with its loss; backward and SGD with momentum."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TrainingStep:
    """Steps of training a network on one batch, by cross-entropy.

    Args:
        model: the network.
        images: `[N, 3, H, W]`.
        labels: `[N]`.
        around: context of the network's forward.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self._images, self._labels, self._around = model, images, labels, around
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def logits(self) -> Tensor:
        """Return the network's output, with its graph."""
        with self._around():
            found: Tensor = self.model(self._images)
            return found

    def loss(self, logits: Tensor) -> Tensor:
        """Return the cross-entropy, in float32."""
        return F.cross_entropy(logits.float(), self._labels)

    def forward(self) -> Tensor:
        """Return the loss, with its graph."""
        return self.loss(self.logits())

    def finish(self, loss: Tensor) -> None:
        """Take the gradients of a loss, and move the weights."""
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def __call__(self) -> Tensor:
        """Take a whole step, and return its loss."""
        loss = self.forward()
        self.finish(loss)
        return loss.detach()
