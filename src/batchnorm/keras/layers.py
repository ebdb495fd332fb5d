"""`BatchNormalization` for Keras 3: the stock layer's drop-in, on every backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from batchnorm.errors import BatchNormError, OptionError
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.policy import Policy
from batchnorm.statistics.synced import Synced

from . import ops_path, policies
from .groups import fewest
from .masks import valid_values

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
        frozen: `trainable` stays False whatever it is set to (keyword only).
        statistics: which mean and var (keyword only): `batchnorm.Batch()`, as above, `Ghost(size)`,
            `Renorm()`, `Running()`, `Adapted()` or `Synced(over=...)`, the objects of the torch layers; or
            such a one's config. An attribute of the layer; it can be set, and `compile` called again.
        nonfinite: what a batch with inf or NaN does to the moving statistics (keyword only): "propagate", as
            in Keras, or "skip": they stay, and `skipped`, a weight, counts it.
        small_batch: what a batch, or ghost batch, of one value per channel is normalized by (keyword only):
            "allow", as in Keras, by itself, which makes it beta; "running": by the moving statistics, which
            stay.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable.

    Call arguments:
        inputs: floating, any rank from 2 on.
        training: use the batch's statistics, and move the moving ones. A layer that was told False wherever
            a functional model was made of it never does; the stock layer does inside `fit`.
        mask: `[N, *S]`, the inputs' shape without the channel axis, True = the value counts in the
            statistics. Masked positions are normalized with the rest. A mask of Keras's own, of the inputs'
            shape without the last axis, serves too where the two cannot be confused.

    Raises:
        InputShapeError: (a ValueError) a mask that does not fit.
        OptionError: (a ValueError) a policy or option that Keras cannot keep to, or two that contradict.
        RankError: (a RuntimeError) on torch.distributed, a rank did not come to a layer that shares
            statistics, or came to another one; ranks know the layer by its name.
        ValueError: as the stock layer, for wrong options.

    Differs from Keras: moving statistics of 16-bit layers are float32; accurate for |mean|/std up to 1e6,
    where the stock layer loses float32 to cancellation; masks are right for channels-first data and for one
    channel; a batch with no valid value leaves the moving statistics alone; `synchronized` works on every
    backend and counts masked values right; `frozen`; `statistics`, `nonfinite` and `small_batch`. A `Renorm`
    whose bounds open with time has one weight more, `batches`.

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
        statistics: Policy | dict[str, Any] = Batch(),  # noqa: B008 -- frozen
        nonfinite: str = "propagate",
        small_batch: str = "allow",
        **kwargs: Any,
    ) -> None:
        self._frozen = False  # read by `trainable`, which the base class sets
        self._infers_in_graphs: bool | None = None  # told so in all functional models; None: in none
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
        self.batches: Any = None
        self.skipped: Any = None
        self.statistics = statistics
        try:
            self.nonfinite = policies.checked_nonfinite(nonfinite)
            self.small_batch = policies.checked_small_batch(small_batch)
        except BatchNormError as error:
            raise error.at(self._label) from None

    @property
    def statistics(self) -> Policy:
        """Which statistics the layer normalizes by; set it to change that, and compile the model again."""
        return self._statistics

    @statistics.setter
    def statistics(self, policy: Policy | dict[str, Any]) -> None:
        try:
            found = policies.checked_policy(policy, renorm=self.renorm, synchronized=self.synchronized)
            if self.built and found.counts_batches != (self.batches is not None):
                raise OptionError(
                    f"statistics={found} {'needs a' if self.batches is None else 'has no'} count of "
                    "batches, and a layer that is built keeps its weights: make a new one from its config, "
                    "with the other policy, and set its weights"
                )
        except BatchNormError as error:
            raise error.at(self._label) from None
        self._statistics = found

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
        if self.statistics.counts_batches:
            self.batches = self._counter("batches")
        if self.nonfinite == "skip":
            self.skipped = self._counter("skipped")
        if isinstance(self.activation, keras.layers.Layer) and not self.activation.built:
            self.activation.build(input_shape)

    def add_weight(self, *args: Any, trainable: bool = True, **kwargs: Any) -> keras.Variable:
        """As every layer's; but what does not learn are statistics, which stay float32 in a 16-bit layer."""
        if not trainable and self.variable_dtype in ("float16", "bfloat16"):
            kwargs.setdefault("dtype", "float32")
        return super().add_weight(*args, trainable=trainable, **kwargs)

    def _counter(self, name: str) -> keras.Variable:
        return self.add_weight(
            shape=(),
            name=name,
            dtype="int32",
            initializer="zeros",
            trainable=False,
            aggregation="only_first_replica",
        )

    @property
    def _label(self) -> str:
        return f"{self.name} ({type(self).__name__})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer; and note what the making of functional models says: to heed `training=False`.

        Inside `fit` such a model (Keras 3.15) calls its layers with its own `training`, whatever they were
        told: https://github.com/keras-team/keras/issues/20285.
        """
        if any(isinstance(value, keras.KerasTensor) for value in (*args, *kwargs.values())):
            says_inference = kwargs.get("training") is False
            self._infers_in_graphs = says_inference and self._infers_in_graphs is not False
        return super().__call__(*args, **kwargs)

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the normalized inputs; see the class."""
        x = inputs
        axis = self.axis % len(x.shape)
        try:
            valid = None if mask is None else valid_values(mask, x, axis)
        except BatchNormError as error:
            # In the message itself: Keras raises it anew, with the call's arguments behind it.
            raise type(error)(f"{self._label}: {error.message}") from None
        by_batch = bool(training) and self.trainable and not self._infers_in_graphs
        if self._runs_on_kernels(x, axis, valid, by_batch):
            from .torch_backend import call

            return call(self, x, axis, by_batch)
        return ops_path.call(self, x, axis, by_batch, valid)

    def _runs_on_kernels(self, x: Tensor, axis: int, valid: Tensor | None, by_batch: bool) -> bool:
        """Whether batchnorm's own kernels, which take torch tensors, do all of this call."""
        if keras.backend.backend() != "torch":
            return False
        policy = self.statistics
        if not policy.measures(by_batch):
            return True
        is_shared = by_batch and (self.synchronized or isinstance(policy, Synced))
        may_be_small = by_batch and self.small_batch == "running"
        return (
            valid is None
            and not is_shared
            and not (may_be_small and fewest(x, axis, policy.groups(by_batch)) < 2)
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

    def get_config(self) -> dict[str, Any]:
        """As the stock layer's, with what else there is, as plain data."""
        config: dict[str, Any] = super().get_config()
        return {
            **config,
            "synchronized": self.synchronized,
            "activation": keras.activations.serialize(self.activation),
            "frozen": self.frozen,
            "statistics": json.loads(self.statistics.text),  # tuples are lists there
            "nonfinite": self.nonfinite,
            "small_batch": self.small_batch,
        }
