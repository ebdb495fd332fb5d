"""Layers of packages that are not installed here, under the qualified names that they have there."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@pytest.fixture
def timm_norm(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """`timm.layers.norm_act.BatchNormAct2d`: drop and activation within the norm."""

    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(
            self, num_features: int, act: nn.Module | None = None, drop: nn.Module | None = None
        ) -> None:
            super().__init__(num_features)
            self.drop = nn.Identity() if drop is None else drop
            self.act = nn.Identity() if act is None else act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.drop(super().forward(x)))

    return _placed(BatchNormAct2d, "timm.layers.norm_act", monkeypatch)


@pytest.fixture
def frozen_norm(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """`torchvision.ops.misc.FrozenBatchNorm2d`: buffers only, running statistics always."""

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, num_features: int, eps: float = 1e-5) -> None:
            super().__init__()
            self.eps = eps
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                self.register_buffer(name, torch.full((num_features,), value))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )

    return _placed(FrozenBatchNorm2d, "torchvision.ops.misc", monkeypatch)


@pytest.fixture
def frozen_timm_norm(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """`timm.layers.norm_act.FrozenBatchNormAct2d`: buffers only, drop and activation behind."""

    class FrozenBatchNormAct2d(nn.Module):
        def __init__(self, num_features: int, act: nn.Module | None = None) -> None:
            super().__init__()
            self.eps = 1e-3
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                self.register_buffer(name, torch.full((num_features,), value))
            self.drop = nn.Identity()
            self.act = nn.Identity() if act is None else act

        def forward(self, x: Tensor) -> Tensor:
            spread = (1, -1, 1, 1)
            scale = self.weight.view(spread) * (self.running_var.view(spread) + self.eps).rsqrt()
            x = x * scale + (self.bias.view(spread) - self.running_mean.view(spread) * scale)
            return self.act(self.drop(x))

    return _placed(FrozenBatchNormAct2d, "timm.layers.norm_act", monkeypatch)


def _placed(cls: type[nn.Module], module: str, monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        if name not in sys.modules:  # two stand-ins may be of one package
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    cls.__module__, cls.__qualname__ = module, cls.__name__
    setattr(sys.modules[module], cls.__name__, cls)
    return cls
