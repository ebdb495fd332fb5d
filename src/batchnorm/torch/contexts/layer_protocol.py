"""Declares what the contexts need of a layer, so that they do not import the layers, which import them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from batchnorm.statistics.policy import Policy
from batchnorm.torch.call import RunningState


class ContextLayer(Protocol):
    """A layer as the contexts see it.

    Attributes:
        training: the mode.
        domains: the number of domains.
        _domain: the domain whose statistics are in use; None = domain 0, outside of any context.
        _buffers: the buffers by name, those of all domains among them.
    """

    training: bool
    domains: int
    _domain: int | None
    _buffers: dict[str, Tensor | None]

    @property
    def statistics(self) -> Policy:
        """The statistics policy."""

    def _running_state(self) -> RunningState:
        """Return the running statistics of the domain in use."""

    def _normalize(self, input: Tensor, residual: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Normalize one input, with the mask that the call uses."""
