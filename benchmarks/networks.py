"""Networks in plain torch, with a norm of choice.

Sources: Simonyan & Zisserman 2014, arXiv:1409.1556 (VGG-11); He et al. 2015, arXiv:1512.03385 (ResNet), and
2016, arXiv:1603.05027 (pre-activation); Sandler et al. 2018, arXiv:1801.04381 (MobileNetV2); Tan & Le 2019,
arXiv:1905.11946 (EfficientNet); Huang et al. 2016, arXiv:1608.06993 (DenseNet); Ronneberger et al. 2015,
arXiv:1505.04597 (U-Net, here with norms, padding, and 32 channels at first). As in torchvision: the stride of
a bottleneck is in its 3×3 convolution. Without dropout, so that steps can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

import batchnorm

from .stock import ACTIVATIONS

CLASSES = 1000


class Norm(Protocol):
    """Makes a layer: activation(norm(x)) or, with `adds`, activation(norm(x) + residual)."""

    def __call__(self, channels: int, activation: str | None = None, adds: bool = False) -> nn.Module: ...


class _NormAdd(nn.Module):
    """A norm, an addition and an activation, of which `fuse` makes one layer."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.norm(x)
        y += residual
        found: Tensor = self.activation(y)
        return found


def stock(channels: int, activation: str | None = None, adds: bool = False) -> nn.Module:
    """Return torch's layers, adding and activating in place, as torchvision's networks do."""
    norm = nn.BatchNorm2d(channels)
    behind = nn.Identity() if activation is None else ACTIVATIONS[activation](inplace=True)
    if adds:
        return _NormAdd(norm, behind)
    return norm if activation is None else nn.Sequential(norm, behind)


def ours(channels: int, activation: str | None = None, adds: bool = False) -> nn.Module:  # noqa: ARG001
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
        last = len(sizes) - 1
        self.norms = nn.ModuleList(norm(width, "relu", i == last) for i, width in enumerate(widths[1:]))
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
    for width, stride in _stages(depths):
        outputs = 4 * width if bottleneck else width
        sizes, widths = ((1, 3, 1), (width, width)) if bottleneck else ((3, 3), (width,))
        layers.append(_Residual(norm, sizes, (channels, *widths, outputs), stride))
        channels = outputs
    return nn.Sequential(*layers, *_head(channels))


def _stages(depths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield width and stride of each block of a ResNet."""
    for stage, depth in enumerate(depths):
        for number in range(depth):
            yield 64 * 2**stage, 2 if stage and not number else 1


def _head(channels: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)


def resnet18(norm: Norm) -> nn.Module:
    """Return ResNet-18: 20 norms."""
    return _resnet(norm, (2, 2, 2, 2), bottleneck=False)


def resnet50(norm: Norm) -> nn.Module:
    """Return ResNet-50: 53 norms."""
    return _resnet(norm, (3, 4, 6, 3), bottleneck=True)


class _Excitation(nn.Module):
    """Weigh channels by a gate in 0..1 that depends on their means."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, inner, 1),
            nn.SiLU(),
            nn.Conv2d(inner, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.gate(x) * x
        return found


class _Inverted(nn.Module):
    """Widen, convolve each channel, narrow; the last norm has no activation; the input is its residual.

    Args:
        times: by how much the block widens.
        size: of the convolution.
        activation: of the norms before the last.
        excites: channels are weighed before they are narrowed.
    """

    def __init__(
        self,
        norm: Norm,
        inputs: int,
        outputs: int,
        stride: int,
        times: int,
        size: int = 3,
        activation: str = "relu6",
        excites: bool = False,
    ) -> None:
        super().__init__()
        wide = inputs * times
        widen = [_conv(inputs, wide, 1), norm(wide, activation)] if times != 1 else []
        convolve = [_conv(wide, wide, size, stride, groups=wide), norm(wide, activation)]
        weigh = [_Excitation(wide, max(1, inputs // 4))] if excites else []
        self.body = nn.Sequential(*widen, *convolve, *weigh, _conv(wide, outputs, 1))
        self.adds = stride == 1 and inputs == outputs
        self.norm = norm(outputs, adds=self.adds)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.body(x), x) if self.adds else self.norm(self.body(x))
        return found


# Of each stage: by how much it widens, its outputs, blocks, first stride, and the size of its convolutions.
_Stages = tuple[tuple[int, int, int, int, int], ...]
_MOBILENET_V2: _Stages = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3),
    (6, 160, 3, 2, 3), (6, 320, 1, 1, 3),
)  # fmt: skip
_EFFICIENTNET_B0: _Stages = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
)  # fmt: skip


def _inverted_stages(norm: Norm, stages: _Stages, activation: str, excites: bool) -> Iterator[nn.Module]:
    inputs = 32
    for times, outputs, depth, first_stride, size in stages:
        for number in range(depth):
            stride = first_stride if number == 0 else 1
            yield _Inverted(norm, inputs, outputs, stride, times, size, activation, excites)
            inputs = outputs


def mobilenet_v2(norm: Norm) -> nn.Module:
    """Return MobileNetV2: 52 norms."""
    first = (_conv(3, 32, 3, 2), norm(32, "relu6"))
    stages = _inverted_stages(norm, _MOBILENET_V2, "relu6", excites=False)
    return nn.Sequential(*first, *stages, _conv(320, 1280, 1), norm(1280, "relu6"), *_head(1280))


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


def vgg11(norm: Norm) -> nn.Module:
    """Return VGG-11 with 8 norms; its classifier takes the mean of 7×7 regions, or what there is of them."""
    layers: list[nn.Module] = []
    inputs = 3
    for widths in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        block: list[nn.Module] = []
        for width in widths:
            block += [nn.Conv2d(inputs, width, 3, padding=1), norm(width, "relu")]
            inputs = width
        layers.append(_Block(*block, nn.MaxPool2d(2)))
    classifier = (nn.Linear(512 * 49, 4096), nn.ReLU(True), nn.Linear(4096, 4096), nn.ReLU(True))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *classifier, nn.Linear(4096, CLASSES)
    )


class _Block(nn.Sequential):
    """Layers that belong together."""


class _PreActivation(nn.Module):
    """Norm → ReLU → convolution, three times; the input, or the first activation's projection, is added."""

    def __init__(self, norm: Norm, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = norm(inputs, "relu")
        self.body = nn.Sequential(
            _conv(inputs, width, 1),
            norm(width, "relu"),
            _conv(width, width, 3, stride),
            norm(width, "relu"),
            _conv(width, 4 * width, 1),
        )
        projects = stride != 1 or inputs != 4 * width
        self.shortcut = _conv(inputs, 4 * width, 1, stride) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        found: Tensor = self.body(y)
        return found + (x if self.shortcut is None else self.shortcut(y))


def pre_activation_resnet50(norm: Norm) -> nn.Module:
    """Return ResNet-50 with norms and activations before the convolutions: 49 norms."""
    layers: list[nn.Module] = [_Block(_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1))]
    channels = 64
    for width, stride in _stages((3, 4, 6, 3)):
        layers.append(_PreActivation(norm, channels, width, stride))
        channels = 4 * width
    return nn.Sequential(*layers, norm(channels, "relu"), *_head(channels))


def efficientnet_b0(norm: Norm) -> nn.Module:
    """Return EfficientNet-B0, without stochastic depth: 49 norms."""
    first = _Block(_conv(3, 32, 3, 2), norm(32, "silu"))
    stages = _inverted_stages(norm, _EFFICIENTNET_B0, "silu", excites=True)
    return nn.Sequential(first, *stages, _Block(_conv(320, 1280, 1), norm(1280, "silu")), *_head(1280))


def _double(norm: Norm, inputs: int, outputs: int) -> nn.Module:
    return _Block(
        _conv(inputs, outputs, 3), norm(outputs, "relu"), _conv(outputs, outputs, 3), norm(outputs, "relu")
    )


class _UNet(nn.Module):
    """Down by pooling, up by transposed convolutions, with what was there on the way down beside it."""

    def __init__(self, norm: Norm, widths: tuple[int, ...]) -> None:
        super().__init__()
        ins = (3, *widths[:-1])
        self.down = nn.ModuleList(_double(norm, i, o) for i, o in zip(ins, widths, strict=True))
        self.pool = nn.MaxPool2d(2)
        pairs = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.widen = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in pairs)
        self.up = nn.ModuleList(_double(norm, 2 * o, o) for _, o in pairs)
        self.head = nn.Sequential(nn.Conv2d(widths[0], CLASSES, 1, stride=8), *_head(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        beside = []
        for number, down in enumerate(self.down):
            x = down(x if number == 0 else self.pool(x))
            beside.append(x)
        for widen, up, skip in zip(self.widen, self.up, beside[-2::-1], strict=True):
            x = up(torch.cat((skip, widen(x)), 1))
        found: Tensor = self.head(x)
        return found


def u_net(norm: Norm) -> nn.Module:
    """Return a U-Net of five levels, 18 norms; its output is pooled to logits, as the others' is."""
    return _UNet(norm, (32, 64, 128, 256, 512))


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the parts that checkpointing takes as one."""
    kinds = (_Stem, _Block, _Residual, _Inverted, _Dense, _PreActivation)
    return [module for module in model.modules() if isinstance(module, kinds)]


NORMS: dict[str, Norm] = {"stock": stock, "ours": ours}
NETWORKS: dict[str, Callable[[Norm], nn.Module]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "MobileNetV2": mobilenet_v2,
    "DenseNet-121": densenet121,
    "VGG-11-BN": vgg11,
    "pre-activation ResNet-50": pre_activation_resnet50,
    "EfficientNet-B0": efficientnet_b0,
    "U-Net": u_net,
}
