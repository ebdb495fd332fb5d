"""Declares what a call needs of its layer: the modules of the call cannot import the layer's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from batchnorm.statistics.policy import Policy

Tensor = Any
Variable = Any


class KerasLayer(Protocol):
    """A built layer as its call sees it; see `BatchNormalization` for what the options do.

    Attributes:
        gamma, beta: `[C]`; None where the layer does not scale or center.
        moving_mean, moving_variance: `[C]`.
        renorm_mean, renorm_stddev, moving_stddev: `[C]`, only with `renorm`.
        batches: counts the batches that have moved the statistics; None where the policy does not ask.
        skipped: counts the batches with inf or NaN; None where these are not skipped.
        compute_dtype: dtype of the output.
    """

    momentum: float
    epsilon: float
    center: bool
    scale: bool
    renorm: bool
    renorm_momentum: float
    synchronized: bool
    nonfinite: str
    small_batch: str
    compute_dtype: str
    activation: Callable[[Tensor], Tensor]
    gamma: Variable
    beta: Variable
    moving_mean: Variable
    moving_variance: Variable
    moving_stddev: Variable
    renorm_mean: Variable
    renorm_stddev: Variable
    batches: Variable
    skipped: Variable

    @property
    def statistics(self) -> Policy:
        """The statistics policy."""

    @property
    def _label(self) -> str:
        """The name of the layer in errors."""

    def _renormalization(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return r and d of Keras's batch renormalization, `[C]`."""
