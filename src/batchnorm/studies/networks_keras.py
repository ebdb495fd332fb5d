"""The networks of a study in Keras, with channels last, and the norm factory of each arm."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import keras

from batchnorm.keras import BatchNormalization
from batchnorm.statistics.batch import Batch

from .arms import Arm
from .networks import (
    NETWORKS,
    WS_EPS,
    WS_GAIN,
    Example,
    Layer,
    Layers,
    Norm,
    Residual,
    dropout_rate,
    groups_of,
    layers_of,
    own_network,
)
from .probes_keras import weight_layers

_LAST = {"data_format": "channels_last"}  # whatever the user's Keras is set to
_DROPOUTS: tuple[Callable[..., keras.layers.Layer], ...] = (
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    functools.partial(keras.layers.SpatialDropout2D, **_LAST),
    functools.partial(keras.layers.SpatialDropout3D, **_LAST),
)


class PositionGroupNormalization(keras.layers.GroupNormalization):
    """Normalizes `[N, L, C]` over groups of channels at each position, so that none sees another."""

    def call(self, inputs: Any) -> Any:
        shape = keras.ops.shape(inputs)
        return keras.ops.reshape(super().call(keras.ops.reshape(inputs, (-1, shape[-1]))), shape)


class Scale(keras.layers.Layer):
    """Multiplies by a learned number that starts from 0."""

    def build(self, input_shape: Any) -> None:
        del input_shape
        self.weight = self.add_weight(shape=(), initializer="zeros", name="scale")

    def call(self, inputs: Any) -> Any:
        return self.weight * inputs


def _make_norm(arm: Arm, channels: int, dims: int) -> keras.layers.Layer:
    if arm.norm == "batchnorm":
        return BatchNormalization(statistics=arm.statistics or Batch())
    if arm.norm == "stock":
        return keras.layers.BatchNormalization()
    if arm.norm == "layernorm":
        return keras.layers.GroupNormalization(1) if dims > 1 else keras.layers.LayerNormalization()
    return (PositionGroupNormalization if dims == 1 else keras.layers.GroupNormalization)(groups_of(channels))


class NormFactory:
    """Makes what an arm puts into a network; a network calls it wherever a normalization belongs.

    norm(channels, spatial_dims=0, *, activation=None, dropout=None) -> keras.layers.Layer

    The layer that comes back is normalization → `activation` → dropout, as far as the arm has them; with
    neither it is `activation` alone, or an identity. So one network serves every arm:

        def build(norm):
            return keras.Sequential([
                layers.Reshape((28, 28, 1)),                        # [N, 28, 28] -> [N, 28, 28, 1]
                layers.Conv2D(8, 3), norm(8, spatial_dims=2, activation="relu"),
                layers.Flatten(),
                layers.Dense(64, activation="relu"), norm(64),      # after the activation is as good
                layers.Dense(10),                                   # logits: no softmax
            ])

    Args of a call:
        channels: units or channels of the input, `[N, *S, channels]`.
        spatial_dims: how many dimensions `S` has, 0 to 3.
        activation: applied after the normalization and before dropout: a name, a function or a layer.
        dropout: the probability in arms that drop units; 0.5 of the units without `S`, 0.2 of whole channels
            with it.

    Some arms put the norm after the activation, or dropout before both. `norm.scale()` is for the end of
    residual branches, `x + norm.scale()(branch(x))`: an identity, but in the arm skipinit.

    Batch normalization is `batchnorm.keras.BatchNormalization` with its defaults, which are Keras's. Layer
    normalization is `keras.layers.LayerNormalization`, at each position of a sequence, and over channels and
    `S` together (`keras.layers.GroupNormalization(1)`) of images and volumes. Dropout draws from seeds of its
    own, so that the arms of one seed start from the same weights.
    """

    def __init__(self, arm: Arm, seed: int = 0) -> None:
        self.arm = arm
        self.scales = 0
        self._next_seed = 1_000_003 * seed

    def __call__(
        self,
        channels: int,
        spatial_dims: int = 0,
        *,
        activation: str | Callable[[Any], Any] | None = None,
        dropout: float | None = None,
    ) -> keras.layers.Layer:
        rate = dropout_rate(spatial_dims, dropout)
        parts: list[keras.layers.Layer] = []
        for part in self.arm.order():
            if part == "norm":
                parts.append(_make_norm(self.arm, channels, spatial_dims))
            elif part == "dropout":
                parts.append(_DROPOUTS[spatial_dims](rate, seed=self._next_seed))
                self._next_seed += 1
            elif activation is not None:
                is_layer = isinstance(activation, keras.layers.Layer)
                parts.append(activation if is_layer else keras.layers.Activation(activation))
        if len(parts) > 1:
            return keras.Sequential(parts)
        return parts[0] if parts else keras.layers.Identity()

    def scale(self) -> keras.layers.Layer:
        """Returns what the output of a residual branch goes through."""
        self.scales += 1
        return Scale() if self.arm.skip_init else keras.layers.Identity()


def build_network(
    name: str,
    arm: Arm,
    input_shape: tuple[int, ...],
    classes: int,
    seed: int,
    depth: int | None = None,
    *,
    padded: bool = False,
) -> keras.Model:
    """Builds a network for an arm.

    The arms of one seed start from the same weights. The process's random state is left seeded: a study
    builds in worker processes.

    Args:
        name: of `NETWORKS`, or the user's own as `file.py:function`: a function that takes a `NormFactory`
            (and `depth=`, where the study has depths) and returns a `keras.Model` from float32
            `[N, *input_shape]` to logits `[N, classes]`.
        arm: what the network is treated with.
        input_shape: shape of one example.
        classes: how many outputs are wanted.
        seed: of the initial weights.
        depth: see `settings.Setting`.
        padded: whether the network has a second input, the lengths `[N]` of sequences.

    Raises:
        StudyError: the user's function raised, or returned something else than a model.
    """
    keras.utils.set_random_seed(seed)
    norm = NormFactory(arm, seed)
    if name in NETWORKS:
        layers = layers_of(name, depth, Example(input_shape, classes, channels_last=True))
        model = _assembled(name, layers, norm, input_shape, padded)
    else:
        model = own_network(name, arm, depth, norm, keras.Model, "keras.Model")
    if arm.weight_standardization:
        for layer in list(weight_layers(model).values())[:-1]:
            _standardize(layer)
    return model


def _assembled(
    name: str, layers: Layers, norm: NormFactory, input_shape: tuple[int, ...], padded: bool
) -> keras.Model:
    if not padded:
        made = [part for layer in layers for part in _parts(_made(layer, norm))]
        return keras.Sequential([keras.Input(input_shape), *made], name=name)
    # As long as a batch is, as examples are served with more padding too; flattened, they have one length.
    is_flattened = any(isinstance(layer, Layer) and layer.kind == "flatten" for layer in layers)
    length = input_shape[0] if is_flattened else None
    inputs, lengths = keras.Input((length, *input_shape[1:])), keras.Input(())
    ones = keras.ops.ones_like(inputs if len(input_shape) == 1 else inputs[:, :, 0])
    valid = keras.ops.cumsum(ones, axis=1) <= keras.ops.expand_dims(lengths, 1)  # [N, L]
    x = inputs
    for layer in layers:
        for part in _parts(_made(layer, norm)):
            if isinstance(part, _ValidConv1D | _ValidPool):
                x = part(x, valid)
            elif isinstance(part, BatchNormalization) and norm.arm.is_masked and x.ndim == 3:
                x = part(x, mask=valid)
            else:
                x = part(x)
    return keras.Model([inputs, lengths], x, name=name)


def _parts(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    return layer.layers if isinstance(layer, keras.Sequential) else [layer]


def _standardize(layer: keras.layers.Layer) -> None:
    """Makes a layer compute with its kernel standardized, as in `networks_torch.StandardizedWeight`.

    The layer gets a class of its own, whose property `kernel` is computed from the trained variable.
    """
    kind: Any = type(layer)
    if not isinstance(getattr(kind, "kernel", None), property):
        raise TypeError(f"arm weightstandard: a {kind.__name__} has no kernel to standardize")

    def kernel(self: Any) -> Any:
        trained = super(standardized, self).kernel
        if not getattr(self, "_is_standardized", False):
            return trained
        ops, axes = keras.ops, tuple(range(len(trained.shape) - 1))
        trained = ops.convert_to_tensor(trained)
        mean, var = ops.moments(trained, axes, keepdims=True)
        return WS_GAIN * (trained - mean) * ops.rsqrt(math.prod(trained.shape[:-1]) * var + WS_EPS)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        # Elsewhere `kernel` is the variable, which optimizers and probes look for.
        object.__setattr__(self, "_is_standardized", True)
        try:
            return super(standardized, self).call(*args, **options)
        finally:
            object.__setattr__(self, "_is_standardized", False)

    standardized: Any = type(kind.__name__, (kind,), {"kernel": property(kernel), "call": call})
    layer.__class__ = standardized


def _uniform(fan_in: int) -> dict[str, keras.Initializer]:
    """Returns PyTorch's initializers: weights and biases uniform within ±1/sqrt(fan_in)."""
    limit = 1 / math.sqrt(fan_in)
    return {
        name: keras.initializers.RandomUniform(-limit, limit)
        for name in ("kernel_initializer", "bias_initializer")
    }


class _ValidConv1D(keras.layers.Conv1D):
    """A convolution that reads zeros where there is padding, as beyond the ends."""

    def __init__(self, channels: int, filters: int, width: int, name: str) -> None:
        super().__init__(filters, width, padding="same", name=name, **_LAST, **_uniform(width * channels))

    def call(self, inputs: Any, valid: Any = None) -> Any:
        if valid is not None:
            inputs = inputs * keras.ops.cast(keras.ops.expand_dims(valid, -1), inputs.dtype)
        return super().call(inputs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """Ends the mask of the norm before it: this layer has its own."""


class _ValidPool(keras.layers.Layer):
    """The mean and the maximum over valid positions."""

    def call(self, inputs: Any, valid: Any = None) -> Any:
        ops = keras.ops
        valid = ops.expand_dims(ops.ones_like(inputs[:, :, 0], dtype="bool") if valid is None else valid, -1)
        counts = ops.cast(valid, inputs.dtype)
        mean = ops.sum(inputs * counts, axis=1) / ops.sum(counts, axis=1)
        # Lower than any value, and finite: gradients of where() make NaN of infinities on some backends.
        return ops.concatenate([mean, ops.max(ops.where(valid, inputs, -1e30), axis=1)], axis=-1)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """Ends the mask of the norm before it: there are no positions any more."""


class _Residual(keras.layers.Layer):
    """The sum of a shortcut and a branch."""

    def __init__(
        self,
        branch: keras.Sequential,
        shortcut: keras.Sequential | None,
        scale: keras.layers.Layer,
        name: str,
    ) -> None:
        super().__init__(name=name)
        self.branch, self.shortcut, self.scale = branch, shortcut, scale

    def build(self, input_shape: Any) -> None:
        self.branch.build(input_shape)
        if self.shortcut is not None:
            self.shortcut.build(input_shape)
        self.scale.build(self.branch.compute_output_shape(input_shape))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        past = inputs if self.shortcut is None else self.shortcut(inputs, training=training)
        return past + self.scale(self.branch(inputs, training=training))


_LAYERS: dict[str, Callable[..., keras.layers.Layer]] = {
    "flatten": lambda name: keras.layers.Flatten(name=name, **_LAST),
    "image": lambda *shape, name: keras.layers.Reshape(shape, name=name),
    "dense": lambda inputs, units, name: keras.layers.Dense(units, name=name, **_uniform(inputs)),
    "glorot": lambda _, units, name: keras.layers.Dense(units, name=name),  # Keras's own initializers
    "conv": lambda channels, filters, width, stride, name: keras.layers.Conv2D(
        filters, width, stride, padding="same", name=name, **_LAST, **_uniform(width**2 * channels)
    ),
    "mean": lambda name: keras.layers.GlobalAveragePooling2D(name=name, **_LAST),
    "pool": lambda name: keras.layers.MaxPooling2D(2, name=name, **_LAST),
    "relu": lambda name: keras.layers.ReLU(name=name),
    "frames": lambda name: keras.layers.Identity(name=name),
    # From torch's distribution, as the other layers.
    "embedding": lambda tokens, channels, name: keras.layers.Embedding(
        tokens, channels, embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0), name=name
    ),
    "conv1d": _ValidConv1D,
    "pool1d": lambda name: _ValidPool(name=name),
}


def _made(layer: Layer | Norm | Residual, norm: NormFactory) -> keras.layers.Layer:
    if isinstance(layer, Residual):
        branch, shortcut = (
            keras.Sequential([_made(part, norm) for part in parts]) if parts else None
            for parts in (layer.branch, layer.shortcut)
        )
        assert branch is not None
        return _Residual(branch, shortcut, norm.scale(), layer.name)
    if isinstance(layer, Norm):
        return norm(layer.channels, layer.spatial_dims, activation=layer.activation, dropout=layer.dropout)
    return _LAYERS[layer.kind](*layer.sizes, name=layer.name)
