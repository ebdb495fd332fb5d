"""The networks of a study as tables of layers, which `networks_torch` and `networks_keras` build."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from batchnorm.errors import DataError, OptionError

from .arms import Arm
from .user_code import load_function, naming_the_line, source_of

T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """A layer of a network.

    Attributes:
        kind: a key of each framework's table of layers. `glorot` is a dense layer that starts from Glorot's
            uniform distribution, with a bias of 0; `dense` and `conv` start from PyTorch's.
        name: within the network.
        sizes: the arguments of its kind: inputs and outputs of `dense`, `glorot`, `conv`, `conv1d` (whose
            third is its width) and `embedding`, the shape `(height, width, channels)` for `image`.
    """

    kind: Literal[
        "flatten",
        "image",
        "dense",
        "glorot",
        "conv",
        "pool",
        "relu",
        "frames",
        "embedding",
        "conv1d",
        "pool1d",
    ]
    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Norm:
    """A place for a normalization: the arguments of a call of the arm's `NormFactory`."""

    name: str
    channels: int
    spatial_dims: int = 0
    activation: Literal["relu", "sigmoid"] | None = None
    dropout: float | None = None


Layers = list[Layer | Norm]


def _mlp(input_shape: tuple[int, ...], classes: int, channels_last: bool) -> Layers:
    """Dense 64, ReLU, norm, dense: the textbook example."""
    del channels_last
    return [
        Layer("flatten", "flatten"),
        Layer("dense", "linear1", (math.prod(input_shape), 64)),
        Layer("relu", "relu"),
        Norm("norm", 64),
        Layer("dense", "linear2", (64, classes)),
    ]


def _deep(input_shape: tuple[int, ...], classes: int, channels_last: bool) -> Layers:
    """Eight sigmoid layers of 100 units, each normalized before its sigmoid, and a dense output.

    After section 4.1 of Ioffe & Szegedy (arXiv:1502.03167), which has three such layers; eight are enough for
    gradients to vanish: a sigmoid's slope is at most 1/4. Weights start from Glorot's uniform distribution,
    made for such layers. Units are dropped with probability 0.1: half of every one of eight layers would
    leave nothing to learn from.
    """
    del channels_last
    layers: Layers = [Layer("flatten", "flatten")]
    inputs = math.prod(input_shape)
    for number in range(1, 9):
        layers.append(Layer("glorot", f"linear{number}", (inputs, 100)))
        layers.append(Norm(f"sigmoid{number}", 100, activation="sigmoid", dropout=0.1))
        inputs = 100
    return [*layers, Layer("glorot", "linear9", (inputs, classes))]


def _cnn(input_shape: tuple[int, ...], classes: int, channels_last: bool) -> Layers:
    """Three blocks of 3×3 convolution, norm, ReLU and 2×2 max pooling; a dense output.

    The blocks have 8, 16 and 32 channels: so few that a study takes minutes.
    """
    sides = input_shape[:2] if channels_last else input_shape[-2:]
    if len(input_shape) not in (2, 3) or min(sides) < 8:
        raise DataError(f"network cnn needs images of 8 x 8 or more, and one example has shape {input_shape}")
    height, width = sides
    channels = 1 if len(input_shape) == 2 else input_shape[-1 if channels_last else 0]
    layers: Layers = [Layer("image", "channels", (height, width, channels))]
    for number, filters in enumerate((8, 16, 32), start=1):
        layers.append(Layer("conv", f"conv{number}", (channels, filters)))
        layers.append(Norm(f"relu{number}", filters, spatial_dims=2, activation="relu"))
        layers.append(Layer("pool", f"pool{number}"))
        channels, height, width = filters, height // 2, width // 2
    outputs = Layer("dense", "linear", (channels * height * width, classes))
    return [*layers, Layer("flatten", "flatten"), outputs]


def _conv1d(input_shape: tuple[int, ...], classes: int, channels_last: bool) -> Layers:
    """Two convolutions over 3 frames, each with norm and ReLU; mean and maximum over valid frames; dense."""
    del channels_last
    if len(input_shape) != 2:
        raise DataError(f"network conv1d needs frames [L, C], and one example has shape {input_shape}")
    return [Layer("frames", "frames"), *_over_positions(input_shape[1], (64, 64), (3, 3), classes)]


def _characters(input_shape: tuple[int, ...], classes: int, channels_last: bool) -> Layers:
    """Embedding of bytes, convolutions over 5 and 3 of them, and the rest as conv1d."""
    del channels_last
    if len(input_shape) != 1:
        raise DataError(f"network characters needs bytes [L], and one example has shape {input_shape}")
    return [Layer("embedding", "embedding", (256, 32)), *_over_positions(32, (64, 64), (5, 3), classes)]


def _over_positions(channels: int, filters: tuple[int, ...], widths: tuple[int, ...], classes: int) -> Layers:
    layers: Layers = []
    for number, (outputs, width) in enumerate(zip(filters, widths, strict=True), start=1):
        layers.append(Layer("conv1d", f"conv{number}", (channels, outputs, width)))
        layers.append(Norm(f"relu{number}", outputs, spatial_dims=1, activation="relu"))
        channels = outputs
    return [*layers, Layer("pool1d", "pool"), Layer("dense", "linear", (2 * channels, classes))]


# Each from the shape of an example, the number of classes, and whether channels come last.
NETWORKS: dict[str, Callable[[tuple[int, ...], int, bool], Layers]] = {
    "mlp": _mlp,
    "deep": _deep,
    "cnn": _cnn,
    "conv1d": _conv1d,
    "characters": _characters,
}


def dropout_rate(spatial_dims: int, wanted: float | None) -> float:
    """Returns the probability with which a `NormFactory` drops units, or whole channels of spatial inputs.

    Raises:
        OptionError: there are no layers for inputs of so many spatial dimensions.
    """
    if spatial_dims not in range(4):
        raise OptionError(f"norm(channels, spatial_dims={spatial_dims}): spatial_dims is 0, 1, 2 or 3")
    return wanted if wanted is not None else 0.2 if spatial_dims else 0.5


def own_network(name: str, arm: Arm, norm: Callable[..., object], kind: type[T], kind_name: str) -> T:
    """Returns what the user's function makes of an arm's `NormFactory`.

    Raises:
        StudyError: the function raised, or returned something else than a `kind`.
    """
    function = load_function(name)
    with naming_the_line(f"network {name}, arm {arm.name}", source_of(name)):
        model = function(norm)
        if not isinstance(model, kind):
            returned = f"{name.rpartition(':')[2]} returned {type(model).__name__}"
            raise TypeError(f"{returned}, not a {kind_name}")
    return model
