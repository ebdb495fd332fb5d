"""Batch normalization as plain differentiable torch operations.

torch itself differentiates this form, to any order and in any mode: it serves double backward, forward-mode
differentiation and the transforms of `torch.func`, where a hand-written gradient would need one of its own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.kernels.interface import wide_dtype


class Normalized(NamedTuple):
    """Output, and the batch statistics where they were computed.

    Attributes:
        y: `[N, C, *S]`, in the dtype of x.
        mean: `[1, C]`, wide dtype; None where the statistics were given.
        m2: `[1, C]`, sum of (x - mean)², wide dtype; None where the statistics were given.
        moved: whether the running statistics have moved already.
    """

    y: Tensor
    mean: Tensor | None
    m2: Tensor | None
    moved: bool = False


def is_transforming() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is going on around this call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    eps: float,
    given: tuple[Tensor, Tensor] | None = None,
) -> Normalized:
    """Return y = activation(weight * x̂ + bias + residual), x̂ by the batch's statistics or by `given`.

    Args:
        x: `[N, C, *S]`.
        given: mean and rstd, `[1, C]` each; None = the batch's own.
    """
    spread = (1, -1, *[1] * (x.dim() - 2))
    wide = x.to(wide_dtype(x.device))
    mean = m2 = None
    if given is None:
        count = max(1, x.shape[0] * math.prod(x.shape[2:]))
        dims = [0, *range(2, x.dim())]
        mean = wide.sum(dims) / count
        centred = wide - mean.view(spread)
        m2 = centred.square().sum(dims)
        z = centred * (m2 / count + eps).rsqrt().view(spread)
        mean, m2 = mean.unsqueeze(0), m2.unsqueeze(0)
    else:
        z = (wide - given[0].view(spread)) * given[1].view(spread)
    z = z if weight is None else z * weight.view(spread)
    z = z if bias is None else z + bias.view(spread)
    z = z if residual is None else z + residual
    y = z if activation is None else ACTIVATIONS[activation].value(z)
    return Normalized(y.to(x.dtype), mean, m2)
