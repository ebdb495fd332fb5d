"""Defines `BatchNormalization` for Keras 3, a drop-in for the stock layer on every backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from batchnorm.errors import BatchNormError, OptionError
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.policy import Policy
from batchnorm.statistics.policy_config import check_policy, from_config
from batchnorm.statistics.synced import Synced

from . import ops_backend
from .batch_layout import fewest, valid_values
from .protocols import Tensor

# A function of Keras's: by its name, as the config of an object, or itself.
Function = str | dict[str, Any] | Callable[..., Tensor]
# Option -> its values, and why "raise", which the torch layers have, is none of them.
_CHOICES = {
    "nonfinite": (
        ("propagate", "skip"),
        'nonfinite="raise" would have to wait for the device in every step, which a compiled one cannot: '
        'use nonfinite="skip" and look at layer.skipped, or keras.callbacks.TerminateOnNaN',
    ),
    "small_batch": (
        ("allow", "running"),
        'small_batch="raise" would need the size of the batch, which a compiled step does not have on '
        'every backend: use small_batch="running", or leave it out',
    ),
}


@keras.saving.register_keras_serializable(package="batchnorm")
class BatchNormalization(keras.layers.BatchNormalization):
    """Normalizes each channel of its inputs; drop-in for `keras.layers.BatchNormalization`.

        y = activation(gamma * (x - mean) / sqrt(var + epsilon) + beta)

    In training (`training=True` and `trainable`), mean and var (biased, ÷ n) are the batch's over all axes
    but `axis`, and both moving statistics move towards them:

        moving = momentum * moving + (1 - momentum) * batch

    Otherwise mean and var are the moving ones.

    Args:
        axis: the channel axis: -1, or 1 for channels-first data.
        momentum: fraction 0..1 of the moving statistics that stays. torch's momentum is 1 - this.
        epsilon: added to var.
        center: learn beta, `[C]`.
        scale: learn gamma, `[C]`.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer,
            beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint: as in Keras.
        renorm: batch renormalization (Ioffe 2017): training uses ((x - mean) / std * r + d) * gamma + beta,
            with r = std / renorm_stddev and d = (mean - renorm_mean) / renorm_stddev as constants.
        renorm_clipping: bounds `rmin` and `rmax` of r, and `dmax` of |d|.
        renorm_momentum: momentum of renorm_mean and renorm_stddev.
        synchronized: take the statistics over all replicas, which weigh by their numbers of valid values: in
            TensorFlow's strategies, over torch.distributed's default group, and on JAX, where a batch is
            global anyway.
        activation: function of the output, as Keras's layers take it (keyword only). On the torch backend it
            runs in the same pass where batchnorm's kernels have it.
        frozen: keeps `trainable` False whatever it is set to (keyword only).
        statistics: policy that chooses mean and var (keyword only): `batchnorm.Batch()`, as above,
            `Ghost(size)`, `Renorm()`, `Running()`, `Adapted()` or `Synced(over=...)`, as of the torch layers,
            or its config. To change it later, set the attribute and `compile` the model again.
        nonfinite: effect of a batch with inf or NaN on the moving statistics (keyword only): "propagate", as
            in Keras, or "skip": they stay, and the weight `skipped` counts the batch.
        small_batch: statistics for a batch, or ghost batch, of one value per channel (keyword only): "allow",
            as in Keras: its own, so that the output is beta; "running": the moving ones, which stay.
        warm_start: let the first batch replace the initial moving statistics (keyword only), where momentum
            would keep that fraction of their 0 and 1: a channel whose moving mean is 0 and moving variance 1
            takes the batch's own. With renorm=True, renorm_mean and renorm_stddev do the same.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable.

    Call arguments:
        inputs: floating, `[N, *S, C]`, or `[N, C, *S]` with axis=1.
        training: use the batch's statistics, and move the moving ones. A layer that was called with False
            wherever a functional model was made of it does neither inside `fit`; the stock layer does both.
        mask: `[N, *S]`, the inputs' shape without the channel axis, True = the value counts in the
            statistics. Masked positions are normalized with the rest. Keras's own masks, of the inputs' shape
            without the last axis, serve too where the two shapes cannot be confused.

    Raises:
        InputShapeError: (a ValueError) a mask that does not fit.
        OptionError: (a ValueError) an option or policy that is unknown or that Keras cannot carry out, or two
            that contradict each other.
        RankError: (a RuntimeError) on torch.distributed, a rank did not reach a layer that shares statistics,
            or reached another one; ranks identify the layer by its name.
        ValueError: as the stock layer, for wrong options.

    Example:
        >>> layer = batchnorm.keras.BatchNormalization(activation="relu", statistics=batchnorm.Ghost(32))
        >>> tuple(layer(numpy.random.rand(64, 28, 28, 3), training=True).shape)
        (64, 28, 28, 3)

    Differs from Keras: moving statistics of 16-bit layers are float32; float32 is accurate for |mean|/std up
    to 1e6, where cancellation costs the stock layer its digits; masks are right for channels-first data and
    for one channel; a batch with no valid value leaves the moving statistics alone; `synchronized` works on
    every backend and counts masked values right; `activation`, `frozen`, `statistics`, `nonfinite`,
    `small_batch` and `warm_start` are new. A `Renorm` whose bounds open with time has one weight more,
    `batches`.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167; Ioffe 2017, arXiv:1702.03275.
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Function = "zeros",
        gamma_initializer: Function = "ones",
        moving_mean_initializer: Function = "zeros",
        moving_variance_initializer: Function = "ones",
        beta_regularizer: Function | None = None,
        gamma_regularizer: Function | None = None,
        beta_constraint: Function | None = None,
        gamma_constraint: Function | None = None,
        renorm: bool = False,
        renorm_clipping: dict[str, float] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        activation: Function | None = None,
        frozen: bool = False,
        statistics: Policy | dict[str, Any] = Batch(),  # noqa: B008 -- frozen
        nonfinite: str = "propagate",
        small_batch: str = "allow",
        warm_start: bool = False,
        **kwargs: Any,
    ) -> None:
        self._frozen = False  # read by `trainable`, which the base class sets
        self._infers_in_graphs: bool | None = None  # training=False in all functional models; None: in none
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
        self._shuffler: keras.random.SeedGenerator | None = None
        self.batches: keras.Variable | None = None
        self.skipped: keras.Variable | None = None
        self.statistics = statistics
        self.nonfinite = self._checked("nonfinite", nonfinite)
        self.small_batch = self._checked("small_batch", small_batch)
        if not isinstance(warm_start, bool):
            raise OptionError(f"warm_start must be True or False; got {warm_start!r}", self._label)
        self.warm_start = warm_start

    @property
    def statistics(self) -> Policy:
        """The policy that chooses the statistics; after setting it, compile the model again."""
        return self._statistics

    @statistics.setter
    def statistics(self, policy: Policy | dict[str, Any]) -> None:
        try:
            found = _checked_policy(policy, renorm=self.renorm, synchronized=self.synchronized)
            if self.built and found.is_shuffled and self._shuffler is None:
                raise OptionError(
                    f"statistics={found} needs a generator of random numbers, which a layer that is built "
                    "cannot get: make a new one from its config, with the other policy, and set its weights"
                )
            if self.built and found.counts_batches != (self.batches is not None):
                raise OptionError(
                    f"statistics={found} {'needs a' if self.batches is None else 'has no'} count of "
                    "batches, and a layer that is built keeps its weights: make a new one from its config, "
                    "with the other policy, and set its weights"
                )
        except BatchNormError as error:
            raise error.at(self._label) from None
        self._statistics = found
        if found.is_shuffled and self._shuffler is None:
            self._shuffler = keras.random.SeedGenerator()

    @property
    def frozen(self) -> bool:
        """Whether `trainable` stays False whatever it is set to: no `model.trainable = True` thaws it."""
        return self._frozen

    @frozen.setter
    def frozen(self, value: bool) -> None:
        # Only a change moves `trainable`: frozen=False keeps trainable=False from the constructor or a file.
        # (On TensorFlow, Keras skips the assignment of an equal value itself.)
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
        """Create the weights, also of an activation that is a layer, before a compiled step needs them."""
        super().build(input_shape)
        if self.statistics.counts_batches:
            self.batches = self._counter("batches")
        if self.nonfinite == "skip":
            self.skipped = self._counter("skipped")
        if isinstance(self.activation, keras.layers.Layer) and not self.activation.built:
            self.activation.build(input_shape)

    def add_weight(self, *args: Any, trainable: bool = True, **kwargs: Any) -> keras.Variable:
        """Add a weight; one that does not learn is a statistic, which stays float32 in a 16-bit layer."""
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

    def _checked(self, option: str, value: str) -> str:
        known, why_not_raise = _CHOICES[option]
        if value == "raise":
            raise OptionError(why_not_raise, self._label)
        if value not in known:
            raise OptionError(
                f"{option} must be one of {', '.join(map(repr, known))}; got {value!r}", self._label
            )
        return value

    @property
    def _label(self) -> str:
        return f"{self.name} ({type(self).__name__})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer, and note `training=False` where the call builds a functional model.

        Inside `fit` such a model (Keras 3.15) calls its layers with its own `training` instead:
        https://github.com/keras-team/keras/issues/20285.
        """
        if any(isinstance(value, keras.KerasTensor) for value in (*args, *kwargs.values())):
            says_inference = kwargs.get("training") is False
            self._infers_in_graphs = says_inference and self._infers_in_graphs is not False
        return super().__call__(*args, **kwargs)

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the normalized inputs; see the class."""
        x = inputs
        axis = self.axis % len(x.shape)
        valid = valid_values(mask, x, axis, self._label)
        by_batch = bool(training) and self.trainable and not self._infers_in_graphs
        if not (by_batch and self.statistics.is_shuffled):
            return self._normalize(x, axis, by_batch, valid)
        samples = 1 if axis == 0 else 0
        order = keras.random.shuffle(ops.arange(ops.shape(x)[samples]), seed=self._shuffler)
        if valid is not None and valid.shape[samples] != 1:  # a mask of length 1 holds for all samples
            valid = ops.take(valid, order, axis=samples)
        y = self._normalize(ops.take(x, order, axis=samples), axis, by_batch, valid)
        return ops.take(y, ops.argsort(order), axis=samples)

    def _normalize(self, x: Tensor, axis: int, by_batch: bool, valid: Tensor | None) -> Tensor:
        """Return the normalized values; ghost batches are consecutive samples here."""
        if self._runs_on_kernels(x, axis, valid, by_batch):
            from .torch_backend import call

            return call(self, x, axis, by_batch)
        return ops_backend.call(self, x, axis, by_batch, valid)

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

    def get_config(self) -> dict[str, Any]:
        """Return the stock layer's config with our options, as plain data."""
        config: dict[str, Any] = super().get_config()
        return {
            **config,
            "synchronized": self.synchronized,
            "activation": keras.activations.serialize(self.activation),
            "frozen": self.frozen,
            "statistics": json.loads(self.statistics.text),  # tuples are lists there
            "nonfinite": self.nonfinite,
            "small_batch": self.small_batch,
            "warm_start": self.warm_start,
        }


def _checked_policy(policy: object, *, renorm: bool, synchronized: bool) -> Policy:
    """Return the policy that `statistics` says.

    Args:
        policy: a policy, or its config.
        renorm, synchronized: the layer's options.

    Raises:
        OptionError: no policy, one that Keras cannot keep to, or one that contradicts the layer's options.
    """
    policy = check_policy(from_config(policy) if isinstance(policy, dict) else policy)
    if renorm and policy != Batch():
        raise OptionError(
            f"renorm=True and statistics={policy} are two policies: leave one of them out; "
            "statistics=batchnorm.Renorm(...) renormalizes by the moving statistics"
        )
    if not isinstance(policy, Synced):
        return policy
    if synchronized:
        raise OptionError(
            f"synchronized=True and statistics={policy} say the same thing twice: leave one out"
        )
    if policy.group is not None:
        raise OptionError(
            f"Synced: group={policy.group} is for torch layers; in Keras all replicas share: leave group out"
        )
    if policy.timeout != Synced().timeout:
        raise OptionError(
            f"Synced: timeout={policy.timeout:g} is for torch layers; in Keras the backend's strategy or "
            "process group has its own: leave timeout out"
        )
    return policy
