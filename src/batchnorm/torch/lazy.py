"""Lazy layers: torch's, which become ours when the first input tells the number of channels."""

from __future__ import annotations

from typing import Any

from torch import nn

from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d


class LazyBatchNorm1d(nn.LazyBatchNorm1d):
    cls_to_become: Any = BatchNorm1d
    activation: str | None = None


class LazyBatchNorm2d(nn.LazyBatchNorm2d):
    cls_to_become: Any = BatchNorm2d
    activation: str | None = None


class LazyBatchNorm3d(nn.LazyBatchNorm3d):
    cls_to_become: Any = BatchNorm3d
    activation: str | None = None
