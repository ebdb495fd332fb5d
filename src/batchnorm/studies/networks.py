"""The networks of a study as tables of layers, which `networks_torch` and `networks_keras` build."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

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
        sizes: the arguments of its kind: inputs and outputs of `dense`, `glorot`, `conv` (whose third and
            fourth are its width and stride), `conv1d` (whose third is its width) and `embedding`, the shape
            `(height, width, channels)` for `image`.
    """

    kind: Literal[
        "flatten",
        "image",
        "dense",
        "glorot",
        "conv",
        "pool",
        "mean",
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


@dataclass(frozen=True)
class Residual:
    """The sum of two rows of layers, `shortcut(x) + scale · branch(x)`; `scale` is 1 but for skipinit."""

    name: str
    branch: tuple[Layer | Norm, ...]
    shortcut: tuple[Layer | Norm, ...] = ()


Layers = Sequence[Layer | Norm | Residual]


@dataclass(frozen=True)
class Example:
    """What a network is built for.

    Attributes:
        shape: of one example.
        outputs: of the network: the number of classes.
        channels_last: whether colours come last in `shape`.
    """

    shape: tuple[int, ...]
    outputs: int
    channels_last: bool = False

    def image(self, network: str) -> tuple[int, int, int]:
        """Returns height, width and channels.

        Raises:
            DataError: examples are no images of 8 × 8 or more.
        """
        sides = self.shape[:2] if self.channels_last else self.shape[-2:]
        if len(self.shape) not in (2, 3) or min(sides) < 8:
            raise DataError(
                f"network {network} needs images of 8 x 8 or more, and one example has shape {self.shape}"
            )
        channels = 1 if len(self.shape) == 2 else self.shape[-1 if self.channels_last else 0]
        return sides[0], sides[1], channels


@dataclass(frozen=True)
class KnownNetwork:
    """A network that a study knows by name.

    Attributes:
        layers: returns its layers for examples and a depth.
        depth: how many hidden layers or blocks it has unless it is told; None where it cannot be told.
        is_residual: whether it has residual branches.
    """

    layers: Callable[[Example, int], Layers]
    depth: int | None = None
    is_residual: bool = False

    @property
    def description(self) -> str:
        """What it is, in one line."""
        return (self.layers.__doc__ or "").partition("\n")[0]


def _mlp(example: Example, _: int) -> Layers:
    """Dense 64, ReLU, norm, dense: the textbook example."""
    return [
        Layer("flatten", "flatten"),
        Layer("dense", "linear1", (math.prod(example.shape), 64)),
        Layer("relu", "relu"),
        Norm("norm", 64),
        Layer("dense", "linear2", (64, example.outputs)),
    ]


def _deep(example: Example, depth: int) -> Layers:
    """Eight (or --depth) sigmoid layers of 100 units, each normalized before its sigmoid, and a dense output.

    After section 4.1 of Ioffe & Szegedy (arXiv:1502.03167), which has three such layers; eight are enough for
    gradients to vanish: a sigmoid's slope is at most 1/4. Weights start from Glorot's uniform distribution,
    made for such layers. Units are dropped with probability 0.1: half of every one of eight layers would
    leave nothing to learn from.
    """
    layers: list[Layer | Norm | Residual] = [Layer("flatten", "flatten")]
    inputs = math.prod(example.shape)
    for number in range(1, depth + 1):
        layers.append(Layer("glorot", f"linear{number}", (inputs, 100)))
        layers.append(Norm(f"sigmoid{number}", 100, activation="sigmoid", dropout=0.1))
        inputs = 100
    return [*layers, Layer("glorot", f"linear{depth + 1}", (inputs, example.outputs))]


def _residual_mlp(example: Example, depth: int) -> Layers:
    """Dense 64 and eight (or --depth) residual blocks of norm, ReLU and dense 64; a dense output.

    Norm and activation come before the weights, as in He et al. (arXiv:1603.05027). Without a norm the
    variance of the sum doubles with every block (De & Smith, arXiv:2002.10444). Units are dropped with
    probability 0.1, as in `deep`.
    """

    def block(number: int) -> Residual:
        norm = Norm(f"relu{number}", 64, activation="relu", dropout=0.1)
        return Residual(f"block{number}", (norm, Layer("dense", f"linear{number}", (64, 64))))

    return [
        Layer("flatten", "flatten"),
        Layer("dense", "linear0", (math.prod(example.shape), 64)),
        *map(block, range(1, depth + 1)),
        Norm("relu", 64, activation="relu", dropout=0.1),
        Layer("dense", f"linear{depth + 1}", (64, example.outputs)),
    ]


def _cnn(example: Example, _: int) -> Layers:
    """Three blocks of 3×3 convolution, norm, ReLU and 2×2 max pooling; a dense output.

    The blocks have 8, 16 and 32 channels: so few that a study takes minutes.
    """
    height, width, channels = example.image("cnn")
    layers: list[Layer | Norm | Residual] = [Layer("image", "channels", (height, width, channels))]
    for number, filters in enumerate((8, 16, 32), start=1):
        layers.append(Layer("conv", f"conv{number}", (channels, filters, 3, 1)))
        layers.append(Norm(f"relu{number}", filters, spatial_dims=2, activation="relu"))
        layers.append(Layer("pool", f"pool{number}"))
        channels, height, width = filters, height // 2, width // 2
    outputs = Layer("dense", "linear", (channels * height * width, example.outputs))
    return [*layers, Layer("flatten", "flatten"), outputs]


def _resnet8(example: Example, _: int) -> Layers:
    """A residual network of 8 layers: 3×3 convolutions of 16, 32 and 64 channels; mean over positions; dense.

    The smallest of He et al. (arXiv:1512.03385, section 4.2) for images of this size, with a 1×1 convolution
    on the shortcut where the number of channels grows.
    """
    height, width, channels = example.image("resnet8")
    layers: list[Layer | Norm | Residual] = [
        Layer("image", "channels", (height, width, channels)),
        Layer("conv", "conv0", (channels, 16, 3, 1)),
        Norm("relu0", 16, spatial_dims=2, activation="relu"),
    ]
    inputs = 16
    for number, filters in enumerate((16, 32, 64), start=1):
        stride = 1 if filters == inputs else 2
        branch = (
            Layer("conv", f"conv{number}a", (inputs, filters, 3, stride)),
            Norm(f"relu{number}a", filters, spatial_dims=2, activation="relu"),
            Layer("conv", f"conv{number}b", (filters, filters, 3, 1)),
            Norm(f"norm{number}b", filters, spatial_dims=2, dropout=0.0),
        )
        projection = (
            Layer("conv", f"conv{number}c", (inputs, filters, 1, stride)),
            Norm(f"norm{number}c", filters, spatial_dims=2, dropout=0.0),
        )
        layers.append(Residual(f"block{number}", branch, () if stride == 1 else projection))
        layers.append(Layer("relu", f"relu{number}"))
        inputs = filters
    return [*layers, Layer("mean", "mean"), Layer("dense", "linear", (64, example.outputs))]


def _conv1d(example: Example, _: int) -> Layers:
    """Two convolutions over 3 frames, each with norm and ReLU; mean and maximum over valid frames; dense."""
    if len(example.shape) != 2:
        raise DataError(f"network conv1d needs frames [L, C], and one example has shape {example.shape}")
    channels = example.shape[1]
    return [Layer("frames", "frames"), *_over_positions(channels, (64, 64), (3, 3), example.outputs)]


def _characters(example: Example, _: int) -> Layers:
    """Embedding of bytes, convolutions over 5 and 3 of them, and the rest as conv1d."""
    if len(example.shape) != 1:
        raise DataError(f"network characters needs bytes [L], and one example has shape {example.shape}")
    embedding = Layer("embedding", "embedding", (256, 16))
    return [embedding, *_over_positions(16, (48, 48), (5, 3), example.outputs)]


def _over_positions(channels: int, filters: tuple[int, ...], widths: tuple[int, ...], outputs: int) -> Layers:
    layers: list[Layer | Norm] = []
    for number, (units, width) in enumerate(zip(filters, widths, strict=True), start=1):
        layers.append(Layer("conv1d", f"conv{number}", (channels, units, width)))
        layers.append(Norm(f"relu{number}", units, spatial_dims=1, activation="relu"))
        channels = units
    return [*layers, Layer("pool1d", "pool"), Layer("dense", "linear", (2 * channels, outputs))]


# Of standardized weights: keeps the variance of a ReLU's output at 1 (Brock et al. 2021, arXiv:2101.08692).
WS_GAIN = math.sqrt(2 / (1 - 1 / math.pi))
WS_EPS = 1e-4

NETWORKS = {
    "mlp": KnownNetwork(_mlp),
    "deep": KnownNetwork(_deep, depth=8),
    "residual-mlp": KnownNetwork(_residual_mlp, depth=8, is_residual=True),
    "cnn": KnownNetwork(_cnn),
    "resnet8": KnownNetwork(_resnet8, is_residual=True),
    "conv1d": KnownNetwork(_conv1d),
    "characters": KnownNetwork(_characters),
}


def layers_of(network: str, depth: int | None, example: Example) -> Layers:
    """Returns the layers of a known network.

    Raises:
        DataError: it is not for such examples.
    """
    known = NETWORKS[network]
    return known.layers(example, depth or known.depth or 0)


def groups_of(channels: int) -> int:
    """Returns how many groups a group normalization has: as many as leave 8 channels or more in each."""
    return max(groups for groups in range(1, max(1, channels // 8) + 1) if channels % groups == 0)


def dropout_rate(spatial_dims: int, wanted: float | None) -> float:
    """Returns the probability with which a `NormFactory` drops units, or whole channels of spatial inputs.

    Raises:
        OptionError: there are no layers for inputs of so many spatial dimensions.
    """
    if spatial_dims not in range(4):
        raise OptionError(f"norm(channels, spatial_dims={spatial_dims}): spatial_dims is 0, 1, 2 or 3")
    return wanted if wanted is not None else 0.2 if spatial_dims else 0.5


def own_network(
    name: str, arm: Arm, depth: int | None, norm: NormFactory, kind: type[T], kind_name: str
) -> T:
    """Returns what the user's function makes of an arm's `NormFactory`, and of a depth if there is one.

    Raises:
        StudyError: the function raised, returned something else than a `kind`, or has no place for the arm.
    """
    function = load_function(name)
    with naming_the_line(f"network {name}, arm {arm.name}", source_of(name)):
        model = function(norm) if depth is None else function(norm, depth=depth)
        if not isinstance(model, kind):
            returned = f"{name.rpartition(':')[2]} returned {type(model).__name__}"
            raise TypeError(f"{returned}, not a {kind_name}")
        if arm.skip_init and not norm.scales:
            raise TypeError("it has no residual branch for skipinit: end each with norm.scale()")
    return model


class NormFactory(Protocol):
    """Makes what an arm puts into a network; each framework has its own.

    Attributes:
        scales: how often `scale` was called.
    """

    scales: int
