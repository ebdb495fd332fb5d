"""The networks of a study in PyTorch, and the norm factory that gives each arm its layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import register_parametrization

from batchnorm.statistics.batch import Batch
from batchnorm.torch.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

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


class PositionNorm(nn.LayerNorm):
    """Normalizes `[N, C, L]` over the channels of each position, so that none sees another, or padding."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class PositionGroupNorm(nn.GroupNorm):
    """Normalizes `[N, C, L]` over groups of channels at each position."""

    def forward(self, input: Tensor) -> Tensor:
        positions = input.transpose(1, 2)
        return super().forward(positions.flatten(0, 1)).view(positions.shape).transpose(1, 2)


class StandardizedWeight(nn.Module):
    """Computes weights of mean 0 and variance 1/inputs for each output, times the gain of ReLU.

    Source: Brock et al. 2021, arXiv:2101.08692, after Qiao et al. 2019, arXiv:1903.10520.
    """

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        var, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
        return (WS_GAIN * (rows - mean) * torch.rsqrt(rows.shape[1] * var + WS_EPS)).view_as(weight)


class Scale(nn.Module):
    """Multiplies by a learned number that starts from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(1, channels)


_LAYER_NORMS: tuple[Callable[[int], nn.Module], ...] = (nn.LayerNorm, PositionNorm, _group_norm, _group_norm)
_BATCH_NORMS = (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)
_STOCK = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _make_norm(arm: Arm, channels: int, dims: int) -> nn.Module:
    if arm.norm == "batchnorm":
        return _BATCH_NORMS[dims](channels, statistics=arm.statistics or Batch())
    if arm.norm == "stock":
        return _STOCK[dims](channels)
    if arm.norm == "layernorm":
        return _LAYER_NORMS[dims](channels)
    return (PositionGroupNorm if dims == 1 else nn.GroupNorm)(groups_of(channels), channels)


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


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

    Some arms put the norm after the activation, or dropout before both. `norm.scale()` is for the end of
    residual branches, `x + norm.scale()(branch(x))`: an identity, but in the arm skipinit.

    Batch normalization is `batchnorm.BatchNorm1d/2d/3d` with its defaults; where examples have lengths, they
    mask it, unless the arm says no. Layer normalization is `nn.LayerNorm(channels)`, at each position of a
    sequence, and over channels and `S` together (`nn.GroupNorm(1, channels)`) of images and volumes.
    """

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.scales = 0

    def __call__(
        self,
        channels: int,
        spatial_dims: int = 0,
        *,
        activation: nn.Module | None = None,
        dropout: float | None = None,
    ) -> nn.Module:
        rate = dropout_rate(spatial_dims, dropout)
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for part in self.arm.order():
            if part == "norm":
                parts[part] = _make_norm(self.arm, channels, spatial_dims)
            elif part == "dropout":
                parts[part] = _DROPOUTS[spatial_dims](rate)
            elif activation is not None:
                parts[part] = activation
        if len(parts) > 1:
            return nn.Sequential(parts)
        return next(iter(parts.values()), nn.Identity())

    def scale(self) -> nn.Module:
        """Returns what the output of a residual branch goes through."""
        self.scales += 1
        return Scale() if self.arm.skip_init else nn.Identity()


def build_network(
    name: str,
    arm: Arm,
    input_shape: tuple[int, ...],
    classes: int,
    seed: int,
    depth: int | None = None,
) -> nn.Module:
    """Builds a network for an arm, in training mode.

    Normalizations and dropout draw nothing at their creation, so the arms of one seed start from the same
    weights. The caller's random state is as before.

    Args:
        name: of `NETWORKS`, or the user's own as `file.py:function`: a function that takes a `NormFactory`
            (and `depth=`, where the study has depths) and returns a module from float32 `[N, *input_shape]`
            to `[N, classes]`; where examples have lengths, int64 `[N]`, they are its second argument.
        arm: what the network is treated with.
        input_shape: shape of one example.
        classes: how many outputs are wanted.
        seed: of the initial weights.
        depth: see `settings.Setting`.

    Raises:
        StudyError: the user's function raised, or returned something else than a module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm = NormFactory(arm)
        if name in NETWORKS:
            model: nn.Module = _assembled(layers_of(name, depth, Example(input_shape, classes)), norm)
        else:
            model = own_network(name, arm, depth, norm, nn.Module, "torch.nn.Module")
    if arm.weight_standardization:
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | _ConvNd)]
        for layer in layers[:-1]:
            # Unsafe: without the check that what is computed would be left as it is.
            register_parametrization(layer, "weight", StandardizedWeight(), unsafe=True)
    return model


class Network(nn.Sequential):
    """Layers in a row; those over the positions of sequences are told which positions are valid."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        valid = None  # [N, 1, L]
        if lengths is not None:
            valid = (torch.arange(x.shape[1]) < lengths.unsqueeze(1)).unsqueeze(1)
        for layer in self:
            x = layer(x, valid) if isinstance(layer, _ValidConv1d | _ValidPool) else layer(x)
        return x


class _Frames(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class _Embedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.long()).transpose(1, 2)


class _ValidConv1d(nn.Conv1d):
    """A convolution that reads zeros where there is padding, as beyond the ends."""

    def __init__(self, channels: int, filters: int, width: int) -> None:
        super().__init__(channels, filters, width, padding=width // 2)

    def forward(self, input: Tensor, valid: Tensor | None = None) -> Tensor:
        return super().forward(input if valid is None else input * valid)


class _ValidPool(nn.Module):
    """The mean and the maximum over valid positions."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        if valid is None:
            valid = x.new_ones(1, 1, x.shape[2], dtype=torch.bool)
        mean = (x * valid).sum(2) / valid.sum(2)
        return torch.cat([mean, x.masked_fill(~valid, -torch.inf).amax(2)], 1)


class _Residual(nn.Module):
    """The sum of a shortcut and a branch."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, scale: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.scale = branch, shortcut, scale

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.shortcut(x) + self.scale(self.branch(x))
        return total


class _MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "flatten": nn.Flatten,
    # Images without channels get one.
    "image": lambda height, width, channels: nn.Sequential(
        nn.Flatten(), nn.Unflatten(1, (channels, height, width))
    ),
    "dense": nn.Linear,
    "glorot": nn.Linear,
    "conv": lambda channels, filters, width, stride: nn.Conv2d(
        channels, filters, width, stride, padding=width // 2
    ),
    "pool": lambda: nn.MaxPool2d(2),
    "mean": _MeanOverPositions,
    "relu": nn.ReLU,
    "frames": _Frames,
    "embedding": _Embedding,
    "conv1d": _ValidConv1d,
    "pool1d": _ValidPool,
}
_ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def _assembled(layers: Layers, norm: NormFactory) -> Network:
    return Network(OrderedDict((layer.name, _made(layer, norm)) for layer in layers))


def _made(layer: Layer | Norm | Residual, norm: NormFactory) -> nn.Module:
    if isinstance(layer, Residual):
        branch, shortcut = (
            nn.Sequential(OrderedDict((part.name, _made(part, norm)) for part in parts))
            for parts in (layer.branch, layer.shortcut)
        )
        return _Residual(branch, shortcut, norm.scale())
    if isinstance(layer, Norm):
        activation = None if layer.activation is None else _ACTIVATIONS[layer.activation]()
        return norm(layer.channels, layer.spatial_dims, activation=activation, dropout=layer.dropout)
    made = _LAYERS[layer.kind](*layer.sizes)
    if layer.kind == "glorot" and isinstance(made, nn.Linear):
        nn.init.xavier_uniform_(made.weight)
        nn.init.zeros_(made.bias)
    return made
