"""The networks of a study in PyTorch, and the norm factory that gives each arm its layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from batchnorm.torch.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

from .arms import Arm
from .networks import NETWORKS, Layers, Norm, dropout_rate, own_network


class PositionNorm(nn.LayerNorm):
    """Normalizes `[N, C, L]` over the channels of each position, so that none sees another, or padding."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(1, channels)


_LAYER_NORMS: tuple[Callable[[int], nn.Module], ...] = (nn.LayerNorm, PositionNorm, _group_norm, _group_norm)
_BATCH_NORMS = (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)
_NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "batchnorm": lambda channels, dims: _BATCH_NORMS[dims](channels),
    "layernorm": lambda channels, dims: _LAYER_NORMS[dims](channels),
}
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

    Batch normalization is `batchnorm.BatchNorm1d/2d/3d` with its defaults; where examples have lengths, they
    mask it, unless the arm says no. Layer normalization is `nn.LayerNorm(channels)`, at each position of a
    sequence, and over channels and `S` together (`nn.GroupNorm(1, channels)`) of images and volumes.
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
        rate = dropout_rate(spatial_dims, dropout)
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if self.arm.norm is not None:
            parts["norm"] = _NORMS[self.arm.norm](channels, spatial_dims)
        if activation is not None:
            parts["activation"] = activation
        if self.arm.dropout:
            parts["dropout"] = _DROPOUTS[spatial_dims](rate)
        if len(parts) > 1:
            return nn.Sequential(parts)
        return next(iter(parts.values()), nn.Identity())


def build_network(name: str, arm: Arm, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Builds a network for an arm, in training mode.

    Normalizations and dropout draw nothing at their creation, so the arms of one seed start from the same
    weights. The caller's random state is as before.

    Args:
        name: of `NETWORKS`, or the user's own as `file.py:function`: a function that takes a `NormFactory`
            and returns a module from float32 `[N, *input_shape]` to `[N, classes]`; where examples have
            lengths, int64 `[N]`, they are its second argument.
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
        if name in NETWORKS:
            return _assembled(NETWORKS[name](input_shape, classes, False), norm)
        return own_network(name, arm, norm, nn.Module, "torch.nn.Module")


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


_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "flatten": nn.Flatten,
    # Images without channels get one.
    "image": lambda height, width, channels: nn.Sequential(
        nn.Flatten(), nn.Unflatten(1, (channels, height, width))
    ),
    "dense": nn.Linear,
    "glorot": nn.Linear,
    "conv": lambda channels, filters: nn.Conv2d(channels, filters, 3, padding=1),
    "pool": lambda: nn.MaxPool2d(2),
    "relu": nn.ReLU,
    "frames": _Frames,
    "embedding": _Embedding,
    "conv1d": _ValidConv1d,
    "pool1d": _ValidPool,
}
_ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def _assembled(layers: Layers, norm: NormFactory) -> Network:
    made: OrderedDict[str, nn.Module] = OrderedDict()
    for layer in layers:
        if isinstance(layer, Norm):
            activation = None if layer.activation is None else _ACTIVATIONS[layer.activation]()
            made[layer.name] = norm(
                layer.channels, layer.spatial_dims, activation=activation, dropout=layer.dropout
            )
        else:
            made[layer.name] = _LAYERS[layer.kind](*layer.sizes)
    for layer in layers:
        linear = made[layer.name]
        if not isinstance(layer, Norm) and layer.kind == "glorot" and isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
    return Network(made)
