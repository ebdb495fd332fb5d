"""`BatchNormalization` for Keras 3: the stock layer's drop-in, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from batchnorm.errors import BatchNormError
from batchnorm.statistics.batch import running_update

from .masks import valid_values
from .moments import Moments, moments, normalize
from .synchronized import pooled

Tensor = Any
Activation = str | dict[str, Any] | Callable[[Tensor], Tensor] | None


@keras.saving.register_keras_serializable(package="batchnorm")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization; drop-in for `keras.layers.BatchNormalization`.

        y = activation(gamma * (x - mean) / sqrt(var + epsilon) + beta)

    In training (`training=True` and `trainable`), mean and var (biased, ÷ n) are the batch's over all axes
    but `axis`, and the moving statistics move, both towards the batch's:

        moving = momentum * moving + (1 - momentum) * batch

    Otherwise mean and var are the moving ones.

    Args:
        axis: the channel axis: -1, or 1 for channels-first data.
        momentum: fraction 0..1 of the moving statistics that stays. torch's momentum is 1 - this.
        epsilon: added to var.
        center: learn beta.
        scale: learn gamma.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer,
            beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint: as in Keras.
        renorm: batch renormalization (Ioffe 2017): training uses ((x - mean) / std * r + d) * gamma + beta,
            with r = std / renorm_stddev and d = (mean - renorm_mean) / renorm_stddev as constants.
        renorm_clipping: bounds `rmin` and `rmax` of r, and `dmax` of |d|.
        renorm_momentum: as momentum, of renorm_mean and renorm_stddev.
        synchronized: take the statistics over all replicas, by their numbers of valid values: in TensorFlow's
            strategies, over torch.distributed's default group, and on JAX, where a batch is global anyway.
        activation: applied to the output (keyword only): what every Keras layer takes. On the torch backend
            it runs in the same pass where batchnorm's kernels have it.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable.

    Call arguments:
        inputs: floating, any rank from 2 on.
        training: use the batch's statistics, and move the moving ones.
        mask: `[N, *S]`, the inputs' shape without the channel axis, True = the value counts in the
            statistics. Masked positions are normalized with the rest. A mask of Keras's own, of the inputs'
            shape without the last axis, serves too where the two cannot be confused.

    Raises:
        InputShapeError: (a ValueError) a mask that does not fit.
        ValueError: as the stock layer, for wrong options.

    Differs from Keras: accurate for |mean|/std up to 1e6, where the stock layer loses float32 to
    cancellation; masks are right for channels-first data and for one channel; a batch with no valid value
    leaves the moving statistics alone; `synchronized` works on every backend and counts masked values
    right; `frozen`.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167; Ioffe 2017, arXiv:1702.03275.
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: dict[str, float] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        activation: Activation = None,
        frozen: bool = False,
        **kwargs: Any,
    ) -> None:
        self._frozen = False  # read by `trainable`, which the base class sets
        super().__init__(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_momentum,
            **kwargs,
        )
        self.synchronized = synchronized  # the stock layer refuses it on all backends but one
        self.activation = keras.activations.get(activation)
        self.frozen = frozen

    @property
    def frozen(self) -> bool:
        """Whether `trainable` stays False whatever it is set to: no `model.trainable = True` thaws it."""
        return self._frozen

    @frozen.setter
    def frozen(self, value: bool) -> None:
        # Only a change moves `trainable`: trainable=False, from the constructor or a file, is no business of
        # frozen=False. (On TensorFlow, Keras skips the assignment of an equal value itself.)
        if bool(value) != self._frozen:
            self._frozen = bool(value)
            self.trainable = not self._frozen

    @property
    def trainable(self) -> bool:
        """Whether weights learn and statistics move in training; never while `frozen`."""
        return bool(keras.layers.BatchNormalization.trainable.fget(self))

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.BatchNormalization.trainable.fset(self, bool(value) and not self._frozen)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the weights; an activation's too, where it is a layer, before a compiled step needs them."""
        super().build(input_shape)
        if isinstance(self.activation, keras.layers.Layer) and not self.activation.built:
            self.activation.build(input_shape)

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the normalized inputs; see the class."""
        x = inputs
        axis = self.axis % len(x.shape)
        try:
            valid = None if mask is None else valid_values(mask, x, axis)
        except BatchNormError as error:
            # In the message itself: Keras raises it anew, with the call's arguments behind it.
            raise type(error)(f"{self.name} ({type(self).__name__}): {error.message}") from None
        by_batch = bool(training) and self.trainable
        if self._runs_on_kernels(valid, by_batch):
            from .torch_backend import call

            return call(self, x, axis, by_batch)
        x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
        axes = tuple(dim for dim in range(len(x.shape)) if dim != axis)
        shape = [1] * len(x.shape)
        shape[axis] = -1

        def per_channel(values: Tensor) -> Tensor:
            return ops.reshape(ops.cast(values, x.dtype), shape)

        if by_batch:
            found = moments(x, axes, valid)
            if self.synchronized:
                found = pooled(found)
        else:
            shift, var = per_channel(self.moving_mean), per_channel(self.moving_variance)
            found = Moments(ops.ones_like(var), shift, ops.zeros_like(shift), var)
        gamma = per_channel(self.gamma) if self.scale else ops.ones_like(found.var)
        beta = per_channel(self.beta) if self.center else ops.zeros_like(found.var)
        if by_batch:
            mean, var, count = (ops.reshape(value, (-1,)) for value in (found.mean, found.var, found.count))
            if self.renorm:
                r, d = (per_channel(value) for value in self._renormalization(mean, var))
                gamma, beta = gamma * r, gamma * d + beta
            self._move(mean, var, count)
        scale = gamma * ops.rsqrt(found.var + self.epsilon)
        y = self.activation(normalize(x, found, scale, beta, axes))
        return ops.cast(y, self.compute_dtype)

    def _runs_on_kernels(self, valid: Tensor | None, by_batch: bool) -> bool:
        """Whether batchnorm's own kernels, which take torch tensors, do all of this call."""
        return keras.backend.backend() == "torch" and not (
            by_batch and (valid is not None or self.synchronized)
        )

    def _renormalization(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return r and d, `[C]`, by Keras's equations; constants to the gradient."""
        old_mean = ops.cast(self.renorm_mean, mean.dtype)
        old_std = ops.maximum(ops.cast(self.renorm_stddev, mean.dtype), self.epsilon**0.5)
        bounds = self.renorm_clipping
        r, d = ops.sqrt(var + self.epsilon) / old_std, (mean - old_mean) / old_std
        if bounds.get("rmin") is not None:
            r = ops.maximum(r, bounds["rmin"])
        if bounds.get("rmax") is not None:
            r = ops.minimum(r, bounds["rmax"])
        if bounds.get("dmax") is not None:
            d = ops.clip(d, -bounds["dmax"], bounds["dmax"])
        return ops.stop_gradient(r), ops.stop_gradient(d)

    def _move(self, mean: Tensor, var: Tensor, count: Tensor | None = None) -> None:
        """Move the moving statistics towards the batch's, `[C]`; where a count is 0, they stay."""

        def assign(moving: Any, moved: Tensor) -> Tensor:
            if count is not None:
                moved = ops.where(count > 0, moved, ops.cast(moving, moved.dtype))
            moving.assign(moved)
            return moved

        def move(moving: Any, batch: Tensor, momentum: float) -> Tensor:
            return assign(moving, running_update(ops.cast(moving, batch.dtype), batch, 1 - momentum))

        move(self.moving_mean, mean, self.momentum)
        if not self.renorm:
            move(self.moving_variance, var, self.momentum)
            return
        std = ops.sqrt(var + self.epsilon)
        move(self.renorm_mean, mean, self.renorm_momentum)
        move(self.renorm_stddev, std, self.renorm_momentum)
        moved_std = move(self.moving_stddev, std, self.momentum)
        assign(self.moving_variance, ops.relu(moved_std * moved_std - self.epsilon))

    def get_config(self) -> dict[str, Any]:
        """As the stock layer's, with `activation` and `frozen`."""
        config: dict[str, Any] = super().get_config()
        return {
            **config,
            "synchronized": self.synchronized,
            "activation": keras.activations.serialize(self.activation),
            "frozen": self.frozen,
        }
