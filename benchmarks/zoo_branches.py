"""Blocks of image networks that add or concatenate branches, written as their authors' code does.

Sources: Ding et al. 2021, arXiv:2101.03697 (RepVGG); Vasu et al. 2022, arXiv:2206.04040 (MobileOne), and
2023, arXiv:2303.14189 (FastViT's RepMixer); Wang et al. 2023, arXiv:2307.09283 (RepViT); Zoph et al. 2017,
arXiv:1707.07012 (NASNet's FactorizedReduction); Tan & Le 2019, arXiv:1907.09595 (MixNet); Wang et al. 2019,
arXiv:1911.11929 (CSPNet, as in YOLOv5); Trockman & Kolter 2022, arXiv:2201.09792 (ConvMixer); Paszke et al.
2016, arXiv:1606.02147 (ENet); Yu et al. 2023, arXiv:2303.16900 (InceptionNeXt).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv_norm(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class _RepVGG(nn.Module):
    """3×3, 1×1 and, where the shape stays, the identity: a norm each."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        stays = inputs == outputs and stride == 1
        self.rbr_identity = nn.BatchNorm2d(inputs) if stays else None
        self.rbr_dense = _conv_norm(inputs, outputs, 3, stride)
        self.rbr_1x1 = _conv_norm(inputs, outputs, 1, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        id_out: Any = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return F.relu(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out)


class _MobileOne(nn.Module):
    """Several k×k convolutions, a 1×1 one and the identity."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        stays = inputs == outputs and stride == 1
        self.rbr_skip = nn.BatchNorm2d(inputs) if stays else None
        self.rbr_scale = _conv_norm(inputs, outputs, 1, stride, groups) if size > 1 else None
        self.rbr_conv = nn.ModuleList(_conv_norm(inputs, outputs, size, stride, groups) for _ in range(4))
        self.activation: nn.Module = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        identity_out: Any = 0 if self.rbr_skip is None else self.rbr_skip(x)
        scale_out: Any = 0 if self.rbr_scale is None else self.rbr_scale(x)
        out = scale_out + identity_out
        for conv in self.rbr_conv:
            out += conv(x)
        found: Tensor = self.activation(out)
        return found


class _RepMixer(nn.Module):
    """FastViT's: what a block mixes minus the norm of its input, times a scale, beside the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mixer = _MobileOne(channels, channels, 3, groups=channels)
        self.mixer.activation = nn.Identity()
        self.norm = nn.BatchNorm2d(channels)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))


class _RepViT(nn.Module):
    """A norm behind the sum of two depthwise convolutions and their input; a mixer of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv_norm(channels, channels, 3, groups=channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, groups=channels)
        self.bn = nn.BatchNorm2d(channels)
        self.up, self.down = _conv_norm(channels, 2 * channels, 1), _conv_norm(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn((self.conv(x) + self.conv1(x)) + x)
        found: Tensor = x + self.down(F.gelu(self.up(x)))
        return found


class _FactorizedReduction(nn.Module):
    """NASNet's: two halves of the channels, of shifted pixels, and one norm behind them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.path_1 = nn.Sequential(nn.AvgPool2d(1, stride=2), nn.Conv2d(inputs, outputs // 2, 1, bias=False))
        self.path_2 = nn.Sequential(nn.AvgPool2d(1, stride=2), nn.Conv2d(inputs, outputs // 2, 1, bias=False))
        self.final_path_bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        found: Tensor = self.final_path_bn(torch.cat([self.path_1(x), self.path_2(shifted)], 1))
        return found


class _Separable(nn.Sequential):
    """NASNet's: ReLU, depthwise, pointwise and norm, twice."""

    def __init__(self, channels: int, size: int) -> None:
        depthwise = (nn.Conv2d(channels, channels, size, 1, size // 2, groups=channels) for _ in range(2))
        layers = ((nn.ReLU(), part, *_conv_norm(channels, channels, 1)) for part in depthwise)
        super().__init__(*(layer for group in layers for layer in group))


class _Cell(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.left, self.right = _Separable(channels, 3), _Separable(channels, 5)
        self.squeeze = nn.Sequential(nn.ReLU(), *_conv_norm(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        found: Tensor = self.squeeze(torch.cat([self.left(x) + x, self.right(x) + pooled], 1))
        return found


class _MixNet(nn.Module):
    """Widened, convolved by a kernel size for each half of the channels, with one norm, and narrowed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = 2 * channels
        self.expand = _conv_norm(channels, width, 1)
        self.parts = nn.ModuleList(
            nn.Conv2d(channels, channels, size, 1, size // 2, groups=channels, bias=False) for size in (3, 5)
        )
        self.bn = nn.BatchNorm2d(width)
        self.project = nn.ModuleList(nn.Conv2d(channels, channels // 2, 1, bias=False) for _ in range(2))
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.expand(x))
        y = F.silu(self.bn(self._mixed(self.parts, y)))
        found: Tensor = self.bn2(self._mixed(self.project, y)) + x
        return found

    @staticmethod
    def _mixed(layers: Iterable[Any], x: Tensor) -> Tensor:
        halves = zip(layers, x.chunk(2, 1), strict=True)
        return torch.cat([layer(half) for layer, half in halves], 1)


class _CSP(nn.Module):
    """YOLOv5's BottleneckCSP: a norm and an activation behind the two halves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.cv1, self.cv2 = _conv_norm(channels, half, 1), nn.Conv2d(channels, half, 1, bias=False)
        self.inner = nn.Sequential(*_conv_norm(half, half, 3), nn.SiLU())
        self.cv3, self.bn = nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(channels)
        self.cv4 = _conv_norm(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.cv1(x))
        y = self.cv3(y + self.inner(y))
        return F.silu(self.cv4(F.leaky_relu(self.bn(torch.cat((y, self.cv2(x)), dim=1)), 0.1)))


class _ConvMixer(nn.Module):
    """Norms behind GELU: one is added to the input, one is read by what pads: nothing exact takes them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, groups=channels, padding="same")
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norms[0](F.gelu(self.depthwise(x)))
        found: Tensor = self.norms[1](F.gelu(self.pointwise(x)))
        return found


class _ENet(nn.Module):
    """A norm behind a convolution and pooled images, which no layer has made."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels - 3, 3, 2, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(torch.cat([self.conv(x), F.max_pool2d(x, 2)], 1)).relu()
        return found


class _InceptionNeXt(nn.Module):
    """A norm behind channels that were left alone and convolved ones; a 1×1 convolution behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Conv2d(channels // 4, channels // 4, size, padding=pad, groups=channels // 4)
            for size, pad in ((3, 1), ((1, 5), (0, 2)), ((5, 1), (2, 0)))
        )
        self.norm, self.fc1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 2 * channels, 1)
        self.fc2 = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = x.chunk(4, 1)
        y = torch.cat([first, *(part(half) for part, half in zip(self.parts, others, strict=True))], 1)
        found: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm(y))))
        return found


def _classifier(*blocks: nn.Module, channels: int = 16) -> nn.Sequential:
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def _stem() -> nn.Sequential:
    return nn.Sequential(*_conv_norm(3, 16, 3, 2), nn.ReLU())


def _with(make: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (make(), torch.randn(2, 3, 32, 32))


def _repeated(block: Callable[[int], nn.Module], times: int = 3) -> Callable[[], tuple[nn.Module, Any]]:
    """Return a maker of a stem, some blocks of 16 channels and a classifier."""
    return _with(lambda: _classifier(_stem(), *(block(16) for _ in range(times))))


def _mobile_one(channels: int) -> nn.Sequential:
    return nn.Sequential(
        _MobileOne(channels, channels, 3, groups=channels), _MobileOne(channels, channels, 1)
    )


def _nasnet() -> nn.Module:
    return _classifier(_stem(), _Cell(16), _FactorizedReduction(16, 16), _Cell(16))


def _visformer() -> nn.Module:
    """A norm before the average and the classifier, as in Visformer and NextViT."""
    return _classifier(_stem(), _CSP(16), nn.BatchNorm2d(16))


BRANCHES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "RepVGG": _with(
        lambda: _classifier(
            _RepVGG(3, 16, 2),
            *(_RepVGG(16, 16) for _ in range(3)),
            _RepVGG(16, 32, 2),
            _RepVGG(32, 32),
            channels=32,
        )
    ),
    "MobileOne": _with(lambda: _classifier(_MobileOne(3, 16, 3, 2), *(_mobile_one(16) for _ in range(3)))),
    "FastViT": _repeated(_RepMixer),
    "RepViT": _repeated(_RepViT),
    "NASNet": _with(_nasnet),
    "MixNet": _repeated(_MixNet),
    "CSP": _repeated(_CSP),
    "norm before the average": _with(_visformer),
    "InceptionNeXt": _repeated(_InceptionNeXt),
    "ConvMixer": _repeated(_ConvMixer),
    "ENet": _with(lambda: _classifier(_ENet(16), _CSP(16))),
}
