"""Runs calls that are being exported by torch's own operators, which every exporter knows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.kernels.interface import wide_dtype
from batchnorm.statistics.batch import running_update

from .call import HALVES, Call


def stock(call: Call, *, measures: bool, moves: bool) -> Tensor:
    """Normalize by torch's operators, and move the running mean and variance; the caller moves the count.

    Args:
        call: the call.
        measures: whether the batch's statistics normalize it, or the running ones.
        moves: whether the running ones move.
    """
    input, weight, bias, residual = call.x, call.weight, call.bias, call.residual
    running_mean, running_var, batches, momentum, *_ = call.running
    dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    used: tuple[Tensor | None, ...] = (running_mean, running_var) if moves or not measures else (None, None)
    widens = _widens(input)
    if widens:
        input = input.float()
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
        if not moves:
            used = tuple(None if t is None else t.float() for t in used)
    elif running_mean is not None and running_mean.dtype != input.dtype:
        # beside float32 running statistics, torch's 16-bit operator takes float32 parameters
        weight, bias = (None if t is None else t.to(running_mean.dtype) for t in (weight, bias))
    if momentum is None:
        momentum = 0.0 if batches is None else 1.0 / (batches + 1).to(wide_dtype(batches.device))
    is_apart = widens and any(t is not None and t.dtype != input.dtype for t in used)
    if moves and (is_apart or isinstance(momentum, Tensor)):
        # torch's operator takes a number as momentum, and running statistics in its own dtype. With momentum
        # 1 it writes the statistics of the batch, by which the running ones then move.
        mean, var = (
            None if t is None else torch.zeros_like(t, dtype=input.dtype if is_apart else None) for t in used
        )
        y = F.batch_norm(input, mean, var, weight, bias, measures, 1.0, call.eps)
        for old, new in zip(used, (mean, var), strict=True):
            if old is not None and new is not None:
                old.copy_(running_update(old, new, momentum))
    else:
        number = 0.0 if isinstance(momentum, Tensor) else momentum
        mean, var = used
        y = F.batch_norm(input, mean, var, weight, bias, measures, number, call.eps)
    y = behind(y, residual, call.activation)
    return y if y.dtype == dtype else y.to(dtype)  # the same dtype would be an operator of the graph


def _widens(input: Tensor) -> bool:
    """Whether a 16-bit call is exported in float32: cast, normalized, activated, cast back.

    As one operator of mixed dtypes, ONNX's optimizer (onnxscript 0.7) folds its float32 parameters into the
    16-bit ones of a convolution or Gemm before it, and no runtime reads that; and few activations have a form
    for each 16-bit dtype there.
    """
    return input.dtype in HALVES and (torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export())


def behind(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """Return activation(y + residual)."""
    y = y if residual is None else y + residual
    return y if activation is None else ACTIVATIONS[activation].value(y)
