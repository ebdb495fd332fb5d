"""Names the types of a layer's call: tensors of any backend, and what the call needs of its layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import keras

from batchnorm.statistics.policy import Policy

# A tensor of the backend: `tf.Tensor`, `jax.Array` or `torch.Tensor`; while a functional model is made, a
# `keras.KerasTensor`, which stands for all of them here. Keras declares no types: mypy does not check these.
Tensor: TypeAlias = keras.KerasTensor


class KerasLayer(Protocol):
    """A built `BatchNormalization`, which documents the options.

    Attributes:
        gamma, beta: `[C]`; None where the layer does not scale or center.
        moving_mean, moving_variance: `[C]`.
        renorm_mean, renorm_stddev, moving_stddev: `[C]`, only with `renorm`.
        batches: number of batches that have moved the statistics; None where the policy ignores it.
        skipped: number of batches with inf or NaN; None unless `nonfinite` is "skip".
        compute_dtype: dtype of the output.
    """

    momentum: float
    epsilon: float
    center: bool
    scale: bool
    renorm: bool
    renorm_clipping: dict[str, float]
    renorm_momentum: float
    synchronized: bool
    nonfinite: str
    small_batch: str
    warm_start: bool
    compute_dtype: str
    activation: Callable[[Tensor], Tensor]
    gamma: keras.Variable
    beta: keras.Variable
    moving_mean: keras.Variable
    moving_variance: keras.Variable
    moving_stddev: keras.Variable
    renorm_mean: keras.Variable
    renorm_stddev: keras.Variable
    batches: keras.Variable | None
    skipped: keras.Variable | None

    @property
    def statistics(self) -> Policy:
        """The statistics policy."""

    @property
    def _label(self) -> str:
        """The layer's name in errors."""
