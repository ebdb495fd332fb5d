"""Batch normalizations as projects write them by hand: the usual rivals of `Ghost` and `Renorm`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GhostBatchNorm1d(nn.Module):
    """Ghost batch normalization of `[N, C]`: a stock layer is applied to each chunk of the batch.

    Libraries for TabNet have such a module. The running statistics move once per chunk.

    Args:
        channels: C.
        size: samples of a chunk.
        momentum: running = (1 - momentum) running + momentum batch.
    """

    def __init__(self, channels: int, size: int = 128, momentum: float = 0.01) -> None:
        super().__init__()
        self.size = size
        self.bn = nn.BatchNorm1d(channels, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized batch, of the shape of `x`."""
        chunks = x.chunk(math.ceil(len(x) / self.size))
        return torch.cat([self.bn(chunk) for chunk in chunks])


class BatchRenorm1d(nn.Module):
    """Batch renormalization of `[N, C]`, of torch's operations, with its bounds open.

    Implementations of CrossQ in torch have such a module.

    Args:
        channels: C.
        eps: added to the variance.
        momentum: running = (1 - momentum) running + momentum batch.
        r_max: largest r, the ratio of the batch's and the running standard deviation.
        d_max: largest |d|, the distance of the means in running standard deviations.

    Source: Ioffe 2017, arXiv:1702.03275, algorithm 1.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        channels: int,
        eps: float = 1e-3,
        momentum: float = 0.01,
        r_max: float = 3.0,
        d_max: float = 5.0,
    ) -> None:
        super().__init__()
        self.eps, self.momentum, self.r_max, self.d_max = eps, momentum, r_max, d_max
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized batch, of the shape of `x`."""
        running_std = (self.running_var + self.eps).sqrt()
        if not self.training:
            return self.weight * (x - self.running_mean) / running_std + self.bias
        mean = x.mean(0)
        var = x.var(0, unbiased=False)
        std = (var + self.eps).sqrt()
        r = (std.detach() / running_std).clamp_(1 / self.r_max, self.r_max)
        d = ((mean.detach() - self.running_mean) / running_std).clamp_(-self.d_max, self.d_max)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return self.weight * ((x - mean) / std * r + d) + self.bias
