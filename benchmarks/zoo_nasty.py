"""Small networks in which folding is easily wrong, or easily missed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _SharedHead(nn.Module):
    """One convolution for two levels, with a norm for each, as in detectors: nothing folds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [self.stem(x)]
        levels.append(self.down(levels[0]))
        return [norm(self.conv(level)).relu() for norm, level in zip(self.norms, levels, strict=True)]


class _PreActivation(nn.Module):
    """Norm → ReLU → convolution: the first norm of a block reads what the shortcut reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in range(3):
            y = x
            for part in (2 * block, 2 * block + 1):
                y = self.convs[part](F.relu(self.norms[part](y), inplace=True))
            x = x + y
        return x


class _UNet(nn.Module):
    """Transposed convolutions on the way up; what the shortcut takes is read twice, behind the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=2), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2, groups=4), nn.BatchNorm2d(8), nn.ReLU())
        self.out = nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        found: Tensor = self.out(torch.cat((high, self.up(self.middle(high))), 1))
        return found


class _Standardized(nn.Conv2d):
    """The weight has mean 0 and variance 1 in each output channel."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        weight = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
        return F.conv2d(x, weight.view_as(self.weight), self.bias, self.stride, self.padding)


class _Tapped(nn.Module):
    """A loss or a visitor reads what the convolution returned: nothing folds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.norm(y), y


class _Twice(nn.Module):
    """One norm behind a convolution and elsewhere too: nothing folds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu() + self.norm(x).tanh()


class _Branching(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.conv, self.norm = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.isnan().any():
            raise ValueError("NaN")
        for _ in range(int(x.mean() < 1e6)):
            x = self.norm(self.conv(x)).sigmoid()
        return x


class _Functional(nn.Module):
    """The norm is a function with buffers of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var).relu()


def _with(make: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (make(), torch.randn(2, 3, 16, 16))


NASTY: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "shared convolution": _with(_SharedHead),
    "pre-activation": _with(_PreActivation),
    "U-Net": _with(_UNet),
    "weight-standardized": _with(
        lambda: nn.Sequential(_Standardized(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), _Standardized(8, 8, 1))
    ),
    "tapped convolution": _with(_Tapped),
    "norm called twice": _with(_Twice),
    "control flow": _with(_Branching),
    "functional norm": _with(_Functional),
}
