"""The networks of the experiments, as functions of the study's `NormFactory`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from batchnorm.studies.networks_torch import NormFactory

from .fitting import Build

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}
Activation = Literal["relu", "sigmoid"]


def _dense(inputs: int, outputs: int, activation: Activation) -> nn.Linear:
    """Returns a layer with He's initialization before ReLU, and Glorot's before the sigmoid."""
    layer = nn.Linear(inputs, outputs)
    if activation == "relu":
        nn.init.kaiming_normal_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def dense_net(
    sizes: Sequence[int], activation: Activation = "relu", *, dropout: float | None = None
) -> Build:
    """Returns a network of dense layers, each with norm and activation behind it but the last.

    Args:
        sizes: units of the input, of each hidden layer, and of the output.
        activation: behind each norm.
        dropout: the probability in arms that drop units.
    """

    def build(norm: NormFactory) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, units in itertools.pairwise(sizes[:-1]):
            layers.append(_dense(inputs, units, activation))
            layers.append(norm(units, activation=_ACTIVATIONS[activation](), dropout=dropout))
        return nn.Sequential(*layers, _dense(sizes[-2], sizes[-1], activation))

    return build


def conv_net(
    side: int,
    channels: int,
    classes: int,
    *,
    filters: Sequence[int] = (8, 16),
    hidden: int = 64,
    activation: Activation = "relu",
    dropout: float | None = None,
) -> Build:
    """Returns 3×3 convolutions, each with norm, activation and 2×2 max pooling, and two dense layers.

    Args:
        side: height and width of an image.
        channels: of an image.
        classes: how many outputs there are.
        filters: of each convolution.
        hidden: units of the first dense layer.
        activation: behind each norm.
        dropout: the probability, behind the dense layer, in arms that drop units; convolutions drop none.
    """

    def build(norm: NormFactory) -> nn.Module:
        layers: list[nn.Module] = []
        inputs, size = channels, side
        for outputs in filters:
            layer = nn.Conv2d(inputs, outputs, 3, padding=1)
            (nn.init.kaiming_normal_ if activation == "relu" else nn.init.xavier_uniform_)(layer.weight)
            act = _ACTIVATIONS[activation]()
            layers += [layer, norm(outputs, spatial_dims=2, activation=act, dropout=0.0), nn.MaxPool2d(2)]
            inputs, size = outputs, size // 2
        layers += [nn.Flatten(), _dense(inputs * size * size, hidden, activation)]
        layers.append(norm(hidden, activation=_ACTIVATIONS[activation](), dropout=dropout))
        return nn.Sequential(*layers, _dense(hidden, classes, activation))

    return build


class Residual(nn.Module):
    """A block x + scale(dense(relu(norm(x)))); `skip` and `branch` note the variances of the last forward."""

    def __init__(self, norm: NormFactory, width: int) -> None:
        super().__init__()
        self.norm = norm(width, activation=nn.ReLU(), dropout=0.0)
        self.dense = _dense(width, width, "relu")
        self.scale = norm.scale()
        self.skip = self.branch = float("nan")
        self.is_watched = False

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.scale(self.dense(self.norm(x)))
        if self.is_watched:
            self.skip, self.branch = float(x.var(0).mean()), float(branch.var(0).mean())
        return x + branch


def residual_net(inputs: int, depth: int, classes: int, width: int = 64) -> Build:
    """Returns a dense layer, `depth` residual blocks, norm, ReLU and a dense layer, by He's rule."""

    def build(norm: NormFactory) -> nn.Module:
        blocks = [Residual(norm, width) for _ in range(depth)]
        last = norm(width, activation=nn.ReLU(), dropout=0.0)
        first = nn.Linear(inputs, width)
        nn.init.normal_(first.weight, std=inputs**-0.5)
        return nn.Sequential(nn.Flatten(), first, *blocks, last, _dense(width, classes, "relu"))

    return build
