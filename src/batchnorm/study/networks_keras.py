"""The networks of a study in Keras: those of `networks.py`, layer by layer, with channels last."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras

from batchnorm.errors import DataError, OptionError
from batchnorm.keras import BatchNormalization

from .arms import Arm
from .user_code import load_function, naming_the_line, source_of

_DEEP_LAYERS, _DEEP_UNITS = 8, 100
_CNN_CHANNELS = (8, 16, 32)


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

    Batch normalization is `batchnorm.keras.BatchNormalization` with its defaults, which are Keras's. Layer
    normalization is `keras.layers.LayerNormalization`, and over channels and `S` together
    (`keras.layers.GroupNormalization(1)`) where there is an `S`. Dropout draws from seeds of its own, so that
    the arms of one seed start from the same weights.
    """

    def __init__(self, arm: Arm, seed: int = 0) -> None:
        self.arm = arm
        self._next_seed = 1_000_003 * seed

    def __call__(
        self,
        channels: int,
        spatial_dims: int = 0,
        *,
        activation: str | Callable[[Any], Any] | None = None,
        dropout: float | None = None,
    ) -> keras.layers.Layer:
        del channels  # Keras's layers see it for themselves; networks say it in every framework
        if spatial_dims not in range(4):
            raise OptionError(f"norm(channels, spatial_dims={spatial_dims}): spatial_dims is 0, 1, 2 or 3")
        parts: list[keras.layers.Layer] = []
        if self.arm.norm == "batchnorm":
            parts.append(BatchNormalization())
        elif self.arm.norm == "layernorm":
            spatial = keras.layers.GroupNormalization(1) if spatial_dims else None
            parts.append(spatial or keras.layers.LayerNormalization())
        if activation is not None:
            is_layer = isinstance(activation, keras.layers.Layer)
            parts.append(activation if is_layer else keras.layers.Activation(activation))
        if self.arm.dropout:
            default = 0.2 if spatial_dims else 0.5
            parts.append(self._dropout(spatial_dims, default if dropout is None else dropout))
        if len(parts) > 1:
            return keras.Sequential(parts)
        return parts[0] if parts else keras.layers.Identity()

    def _dropout(self, spatial_dims: int, rate: float) -> keras.layers.Layer:
        seed = self._next_seed
        self._next_seed += 1
        if spatial_dims == 0:
            return keras.layers.Dropout(rate, seed=seed)
        if spatial_dims == 1:
            return keras.layers.SpatialDropout1D(rate, seed=seed)
        spatial = keras.layers.SpatialDropout2D if spatial_dims == 2 else keras.layers.SpatialDropout3D
        return spatial(rate, data_format="channels_last", seed=seed)


def build_network(name: str, arm: Arm, input_shape: tuple[int, ...], classes: int, seed: int) -> keras.Model:
    """Build a network for an arm.

    The arms of one seed start from the same weights. The process's random state is left seeded: a study
    builds in worker processes.

    Args:
        name: `mlp`, `deep`, `cnn`, or the user's own as `file.py:function`: a function that takes a
            `NormFactory` and returns a `keras.Model` from float32 `[N, *input_shape]` to logits
            `[N, classes]`.
        arm: what the network is treated with.
        input_shape: shape of one example.
        classes: how many outputs are wanted.
        seed: of the initial weights.

    Raises:
        StudyError: the user's function raised, or returned something else than a model.
    """
    keras.utils.set_random_seed(seed)
    norm = NormFactory(arm, seed)
    if name in _BUILDERS:
        return _BUILDERS[name](norm, input_shape, classes)
    function = load_function(name)
    with naming_the_line(f"network {name}, arm {arm.name}", source_of(name)):
        model = function(norm)
        if not isinstance(model, keras.Model):
            raise TypeError(f"{name.rpartition(':')[2]} returned {type(model).__name__}, not a keras.Model")
    return model


def mlp(norm: NormFactory, input_shape: tuple[int, ...], classes: int) -> keras.Model:
    """Dense 64, ReLU, norm, dense: the textbook example. PyTorch's initialization, as in `networks.py`."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(64, name="linear1", **_initialization(math.prod(input_shape))),
            keras.layers.ReLU(name="relu"),
            norm(64),
            keras.layers.Dense(classes, name="linear2", **_initialization(64)),
        ],
        name="mlp",
    )


def deep(norm: NormFactory, input_shape: tuple[int, ...], classes: int) -> keras.Model:
    """Eight sigmoid layers of 100 units, each normalized before its sigmoid, and a dense output.

    Why so: see `networks.deep`. Weights start from Glorot's uniform distribution and biases from 0, as Keras
    has it anyway. Units are dropped with probability 0.1.
    """
    layers = [keras.Input(input_shape), keras.layers.Flatten(name="flatten")]
    for number in range(1, _DEEP_LAYERS + 1):
        layers.append(keras.layers.Dense(_DEEP_UNITS, name=f"linear{number}"))
        layers.append(norm(_DEEP_UNITS, activation="sigmoid", dropout=0.1))
    layers.append(keras.layers.Dense(classes, name=f"linear{_DEEP_LAYERS + 1}"))
    return keras.Sequential(layers, name="deep")


def cnn(norm: NormFactory, input_shape: tuple[int, ...], classes: int) -> keras.Model:
    """Three blocks of 3×3 convolution, norm, ReLU and 2×2 max pooling; a dense output.

    The blocks have 8, 16 and 32 channels. PyTorch's initialization, as in `networks.py`.
    """
    if len(input_shape) not in (2, 3) or min(input_shape[:2]) < 8:
        raise DataError(f"network cnn needs images of 8 x 8 or more, and one example has shape {input_shape}")
    height, width, channels = (*input_shape, 1)[:3]
    layers = [keras.Input(input_shape), keras.layers.Reshape((height, width, channels), name="channels")]
    last = {"data_format": "channels_last"}  # whatever the user's Keras is set to
    for number, filters in enumerate(_CNN_CHANNELS, start=1):
        start = _initialization(9 * channels)
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", name=f"conv{number}", **last, **start),
            norm(filters, spatial_dims=2, activation="relu"),
            keras.layers.MaxPooling2D(2, name=f"pool{number}", **last),
        ]
        channels, height, width = filters, height // 2, width // 2
    layers += [
        keras.layers.Flatten(name="flatten", **last),
        keras.layers.Dense(classes, name="linear", **_initialization(channels * height * width)),
    ]
    return keras.Sequential(layers, name="cnn")


def _initialization(fan_in: int) -> dict[str, keras.Initializer]:
    """PyTorch's: weights and biases uniform within ±1/sqrt(fan_in); so the two frameworks start alike."""
    limit = 1 / math.sqrt(fan_in)
    return {
        name: keras.initializers.RandomUniform(-limit, limit)
        for name in ("kernel_initializer", "bias_initializer")
    }


_BUILDERS: dict[str, Callable[[NormFactory, tuple[int, ...], int], keras.Model]] = {
    "mlp": mlp,
    "deep": deep,
    "cnn": cnn,
}
