"""The networks of a study, and the norm factory that gives each arm its layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from batchnorm.errors import DataError, OptionError
from batchnorm.torch.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

from .arms import Arm
from .user_code import load_function, naming_the_line, source_of

_BATCH_NORMS = (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_DEEP_LAYERS, _DEEP_UNITS = 8, 100
_CNN_CHANNELS = (8, 16, 32)


class NormFactory:
    """Makes what an arm puts into a network; a network calls it wherever a normalization belongs.

    norm(channels, spatial_dims=0, *, activation=None, dropout=None) -> nn.Module

    The module that comes back is normalization → `activation` → dropout, as far as the arm has them; with
    neither it is `activation` alone, or an identity. So one network serves every arm:

        def build(norm):
            return nn.Sequential(
                nn.Unflatten(1, (1, 28)),                           # [N, 28, 28] -> [N, 1, 28, 28]
                nn.Conv2d(1, 8, 3), norm(8, spatial_dims=2, activation=nn.ReLU()),
                nn.Flatten(),
                nn.Linear(8 * 26 * 26, 64), nn.ReLU(), norm(64),    # after the activation is as good
                nn.Linear(64, 10),
            )

    Args of a call:
        channels: units or channels of the input, `[N, channels, *S]`.
        spatial_dims: how many dimensions `S` has, 0 to 3.
        activation: applied after the normalization and before dropout.
        dropout: the probability in arms that drop units; 0.5 of the units without `S`, 0.2 of whole channels
            with it.

    Batch normalization is `batchnorm.BatchNorm1d/2d/3d` with its defaults. Layer normalization is
    `nn.LayerNorm(channels)`, and over channels and `S` together (`nn.GroupNorm(1, channels)`) where there is
    an `S`.
    """

    def __init__(self, arm: Arm) -> None:
        self.arm = arm

    def __call__(
        self,
        channels: int,
        spatial_dims: int = 0,
        *,
        activation: nn.Module | None = None,
        dropout: float | None = None,
    ) -> nn.Module:
        if spatial_dims not in range(4):
            raise OptionError(f"norm(channels, spatial_dims={spatial_dims}): spatial_dims is 0, 1, 2 or 3")
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if self.arm.norm == "batchnorm":
            parts["norm"] = _BATCH_NORMS[spatial_dims](channels)
        elif self.arm.norm == "layernorm":
            parts["norm"] = nn.GroupNorm(1, channels) if spatial_dims else nn.LayerNorm(channels)
        if activation is not None:
            parts["activation"] = activation
        if self.arm.dropout:
            default = 0.2 if spatial_dims else 0.5
            parts["dropout"] = _DROPOUTS[spatial_dims](default if dropout is None else dropout)
        if len(parts) > 1:
            return nn.Sequential(parts)
        return next(iter(parts.values()), nn.Identity())


def build_network(name: str, arm: Arm, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Build a network for an arm, in training mode.

    Normalizations and dropout draw nothing at their creation, so the arms of one seed start from the same
    weights. The caller's random state is as before.

    Args:
        name: `mlp`, `deep`, `cnn`, or the user's own as `file.py:function`: a function that takes a
            `NormFactory` and returns a module from float32 `[N, *input_shape]` to `[N, classes]`.
        arm: what the network is treated with.
        input_shape: shape of one example.
        classes: how many outputs are wanted.
        seed: of the initial weights.

    Raises:
        StudyError: the user's function raised, or returned something else than a module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm = NormFactory(arm)
        if name in _BUILDERS:
            return _BUILDERS[name](norm, input_shape, classes)
        function = load_function(name)
        with naming_the_line(f"network {name}, arm {arm.name}", source_of(name)):
            model = function(norm)
            if not isinstance(model, nn.Module):
                raise TypeError(
                    f"{name.rpartition(':')[2]} returned {type(model).__name__}, not a torch.nn.Module"
                )
        return model


def mlp(norm: NormFactory, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Dense 64, ReLU, norm, dense: the textbook example. PyTorch's own initialization."""
    inputs = torch.Size(input_shape).numel()
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            linear1=nn.Linear(inputs, 64),
            relu=nn.ReLU(),
            norm=norm(64),
            linear2=nn.Linear(64, classes),
        )
    )


def deep(norm: NormFactory, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Eight sigmoid layers of 100 units, each normalized before its sigmoid, and a dense output.

    After section 4.1 of Ioffe & Szegedy (arXiv:1502.03167), which has three such layers; eight are enough for
    gradients to vanish: a sigmoid's slope is at most 1/4. Weights start from Glorot's uniform distribution,
    made for such layers, and biases from 0. Units are dropped with probability 0.1: half of every one of
    eight layers would leave nothing to learn from.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    inputs = torch.Size(input_shape).numel()
    for number in range(1, _DEEP_LAYERS + 1):
        layers[f"linear{number}"] = nn.Linear(inputs, _DEEP_UNITS)
        layers[f"sigmoid{number}"] = norm(_DEEP_UNITS, activation=nn.Sigmoid(), dropout=0.1)
        inputs = _DEEP_UNITS
    layers[f"linear{_DEEP_LAYERS + 1}"] = nn.Linear(inputs, classes)
    for layer in layers.values():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(layers)


class _AsChannels(nn.Module):
    """Gives images without channels one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1) if x.dim() == 3 else x


def cnn(norm: NormFactory, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Three blocks of 3×3 convolution, norm, ReLU and 2×2 max pooling; a dense output.

    The blocks have 8, 16 and 32 channels: so few that a study takes minutes. PyTorch's own initialization.
    """
    if len(input_shape) not in (2, 3) or min(input_shape[-2:]) < 8:
        raise DataError(f"network cnn needs images of 8 x 8 or more, and one example has shape {input_shape}")
    channels = input_shape[0] if len(input_shape) == 3 else 1
    height, width = input_shape[-2:]
    layers: OrderedDict[str, nn.Module] = OrderedDict(channels=_AsChannels())
    for number, filters in enumerate(_CNN_CHANNELS, start=1):
        layers[f"conv{number}"] = nn.Conv2d(channels, filters, 3, padding=1)
        layers[f"relu{number}"] = norm(filters, spatial_dims=2, activation=nn.ReLU())
        layers[f"pool{number}"] = nn.MaxPool2d(2)
        channels, height, width = filters, height // 2, width // 2
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(channels * height * width, classes)
    return nn.Sequential(layers)


_BUILDERS: dict[str, Callable[[NormFactory, tuple[int, ...], int], nn.Module]] = {
    "mlp": mlp,
    "deep": deep,
    "cnn": cnn,
}
