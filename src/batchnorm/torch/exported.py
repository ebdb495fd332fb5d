"""Calls that are being exported, as torch's own operators, which every exporter knows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F

from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.kernels.interface import wide_dtype
from batchnorm.statistics.batch import running_update

from .settings import Settings, Tracked


def is_exporting() -> bool:
    """Whether torch.export, torch.jit.trace or make_fx looks on: they record operators, and no kernels."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return True
    return not torch.compiler.is_compiling() and get_proxy_mode() is not None


def stock(
    input: Tensor,
    tracked: Tracked,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    settings: Settings,
    *,
    measures: bool,
    moves: bool,
) -> Tensor:
    """Normalize by torch's operators, and move what `tracked` has, the count apart.

    Args:
        measures: by the batch; else by the running statistics.
        moves: and move these.
    """
    running_mean, running_var, batches, momentum, *_ = tracked
    if running_mean is not None and running_mean.dtype != input.dtype:
        # its 16-bit form wants float32 parameters
        weight, bias = (None if t is None else t.to(running_mean.dtype) for t in (weight, bias))
    if momentum is None:
        momentum = 0.0 if batches is None else 1.0 / (batches + 1).to(wide_dtype(batches.device))
    used = (running_mean, running_var) if moves or not measures else (None, None)
    if isinstance(momentum, Tensor) and moves:
        # torch's operator takes a number: read the batch off it, and move by hand
        mean, var = (None if t is None else torch.zeros_like(t) for t in used)
        y = F.batch_norm(input, mean, var, weight, bias, measures, 1.0, settings.eps)
        for old, new in zip(used, (mean, var), strict=True):
            if old is not None and new is not None:
                old.copy_(running_update(old, new, momentum))
    else:
        number = 0.0 if isinstance(momentum, Tensor) else momentum
        y = F.batch_norm(input, *used, weight, bias, measures, number, settings.eps)
    return behind(y, residual, settings.activation)


def behind(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """Return activation(y + residual)."""
    y = y if residual is None else y + residual
    return y if activation is None else ACTIVATIONS[activation].value(y)
