"""Lazy layers: torch's, which become ours when the first input tells the number of channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from batchnorm.statistics.batch import Batch
from batchnorm.statistics.policy import Policy

from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, _Layer
from .symbolic import OneNode


class _Lazy(OneNode, nn.modules.batchnorm._BatchNorm):
    """What the lazy form keeps for the layer that it becomes."""

    activation: str | None = None
    domains: int = 1
    statistics: Any = _Layer.statistics
    _statistics: Policy = Batch()
    _pool: Any = None
    _scope: Any = None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the layer that it has become: torch takes this method, then lets the hook change the class."""
        if isinstance(self, _Layer):
            return self.forward(input, *args, **kwargs)
        y: Tensor = super().forward(input)  # called past the hook: it raises, as the stock lazy layer does
        return y


class LazyBatchNorm1d(_Lazy, nn.LazyBatchNorm1d):
    cls_to_become: Any = BatchNorm1d


class LazyBatchNorm2d(_Lazy, nn.LazyBatchNorm2d):
    cls_to_become: Any = BatchNorm2d


class LazyBatchNorm3d(_Lazy, nn.LazyBatchNorm3d):
    cls_to_become: Any = BatchNorm3d
