"""ResNet-18 and -50, MobileNetV2 and DenseNet-121 in plain torch, with whatever norm they are given.

Sources: He et al. 2015, arXiv:1512.03385; Sandler et al. 2018, arXiv:1801.04381; Huang et al. 2016,
arXiv:1608.06993. As in torchvision: the stride of a bottleneck is in its 3×3 convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

import batchnorm

from .stock import StockChain

CLASSES = 1000


class Norm(Protocol):
    """Makes a layer for `channels` channels: activation(norm(x) + residual), called with x or with both."""

    def __call__(self, channels: int, activation: str | None = None) -> nn.Module: ...


def stock(channels: int, activation: str | None = None) -> nn.Module:
    """Return torch's layers, adding and activating in place, as torchvision's networks do."""
    return StockChain(4, channels, activation, in_place=True)


def ours(channels: int, activation: str | None = None) -> nn.Module:
    """Return our one layer."""
    return batchnorm.BatchNorm2d(channels, activation=activation)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


class _Stem(nn.Sequential):
    """Convolution 7×7, norm → ReLU, pooling: to a quarter of the sides."""

    def __init__(self, norm: Norm) -> None:
        super().__init__(_conv(3, 64, 7, 2), norm(64, "relu"), nn.MaxPool2d(3, 2, 1))


class _Residual(nn.Module):
    """Convolutions with a norm behind each, the last norm with the shortcut as its residual."""

    def __init__(self, norm: Norm, sizes: tuple[int, ...], widths: tuple[int, ...], stride: int) -> None:
        super().__init__()
        strided = sizes.index(3)
        self.convs = nn.ModuleList(
            _conv(widths[i], widths[i + 1], size, stride if i == strided else 1)
            for i, size in enumerate(sizes)
        )
        self.norms = nn.ModuleList(norm(width, "relu") for width in widths[1:])
        self.shortcut: nn.Module | None = None
        if stride != 1 or widths[0] != widths[-1]:
            self.shortcut = nn.Sequential(_conv(widths[0], widths[-1], 1, stride), norm(widths[-1]))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for conv, norm in zip(self.convs[:-1], self.norms[:-1], strict=True):
            x = norm(conv(x))
        found: Tensor = self.norms[-1](self.convs[-1](x), shortcut)
        return found


def _resnet(norm: Norm, depths: tuple[int, ...], bottleneck: bool) -> nn.Module:
    layers: list[nn.Module] = [_Stem(norm)]
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        for number in range(depth):
            stride = 2 if stage and not number else 1
            if bottleneck:
                layers.append(_Residual(norm, (1, 3, 1), (channels, width, width, 4 * width), stride))
            else:
                layers.append(_Residual(norm, (3, 3), (channels, width, width), stride))
            channels = 4 * width if bottleneck else width
    return nn.Sequential(*layers, *_head(channels))


def _head(channels: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)


def resnet18(norm: Norm) -> nn.Module:
    """Return ResNet-18: 20 norms."""
    return _resnet(norm, (2, 2, 2, 2), bottleneck=False)


def resnet50(norm: Norm) -> nn.Module:
    """Return ResNet-50: 53 norms."""
    return _resnet(norm, (3, 4, 6, 3), bottleneck=True)


class _Inverted(nn.Module):
    """Widen, convolve each channel, narrow; the last norm has no activation; the input is its residual."""

    def __init__(self, norm: Norm, inputs: int, outputs: int, stride: int, times: int) -> None:
        super().__init__()
        wide = inputs * times
        widen = [_conv(inputs, wide, 1), norm(wide, "relu6")] if times != 1 else []
        self.body = nn.Sequential(
            *widen, _conv(wide, wide, 3, stride, groups=wide), norm(wide, "relu6"), _conv(wide, outputs, 1)
        )
        self.norm = norm(outputs)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.body(x), x) if self.adds else self.norm(self.body(x))
        return found


def mobilenet_v2(norm: Norm) -> nn.Module:
    """Return MobileNetV2: 52 norms."""
    layers: list[nn.Module] = [_conv(3, 32, 3, 2), norm(32, "relu6")]
    inputs = 32
    for times, outputs, depth, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for number in range(depth):
            layers.append(_Inverted(norm, inputs, outputs, stride if number == 0 else 1, times))
            inputs = outputs
    return nn.Sequential(*layers, _conv(inputs, 1280, 1), norm(1280, "relu6"), *_head(1280))


class _Dense(nn.Module):
    """Norm → ReLU → convolution, twice; what comes out stands behind what came in."""

    def __init__(self, norm: Norm, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            norm(inputs, "relu"),
            _conv(inputs, 4 * growth, 1),
            norm(4 * growth, "relu"),
            _conv(4 * growth, growth, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.body(x)), 1)


def densenet121(norm: Norm) -> nn.Module:
    """Return DenseNet-121: 121 norms."""
    layers: list[nn.Module] = [_Stem(norm)]
    channels, growth = 64, 32
    for stage, depth in enumerate((6, 12, 24, 16)):
        if stage:
            layers += [norm(channels, "relu"), _conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(depth):
            layers.append(_Dense(norm, channels, growth))
            channels += growth
    return nn.Sequential(*layers, norm(channels, "relu"), *_head(channels))


NETWORKS: dict[str, Callable[[Norm], nn.Module]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "MobileNetV2": mobilenet_v2,
    "DenseNet-121": densenet121,
}
