"""Defines the record of a call (its tensors, running statistics and options) and that of its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.interface import RunningState
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import Policy

Gradients = tuple[Tensor | None, ...]  # dx, dweight, dbias, dresidual, ...
HALVES = (torch.float16, torch.bfloat16)
NO_RUNNING_STATE = RunningState()
_BATCH = Batch()


class Call(NamedTuple):
    """A call of a layer or function, filled once and handed down to the engine.

    Attributes:
        x: input `[N, C, *S]`.
        weight, bias: `[C]`; None = 1 and 0.
        residual: `[N, C, *S]`, added before the activation; None = 0.
        mask: `[N, *S]` bool, True = the value counts; None = all do.
        activation: its name; None = identity.
        eps: added to var.
        group_size: samples that share statistics in this call; None = all.
        running: running statistics.
        policy: which statistics the call normalizes by.
        training: the mode.
        nonfinite: "propagate", "skip" or "raise": what a batch with inf or NaN does in training.
        small_batch: "raise" or "running": what one value per channel is normalized by in training.
        label: returns the name by which other ranks know the layer; None for a function.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    mask: Tensor | None = None
    activation: str | None = None
    eps: float = 1e-5
    group_size: int | None = None
    running: RunningState = NO_RUNNING_STATE
    policy: Policy = _BATCH
    training: bool = True
    nonfinite: str = "propagate"
    small_batch: str = "raise"
    label: Callable[[], str] | None = None


class Normalized(NamedTuple):
    """Output, and the batch statistics where they were computed.

    Attributes:
        y: `[N, C, *S]`, in the dtype of x.
        batch: moments of each group, `[G, C]`, wide; of all ranks, where these share them; None where the
            statistics were given.
        moved: whether the running statistics have moved already.
    """

    y: Tensor
    batch: PooledMoments | None
    moved: bool = False


def cleared(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return values `[N, C, *S]` with 0 where the mask leaves them out, whatever was there."""
    return values if mask is None else torch.where(mask.unsqueeze(1), values, 0.0).to(values.dtype)


def cast(
    ctx: Any, gradients: Gradients, dy: Tensor, activation: str | None, mask: Tensor | None
) -> Gradients:
    """Return dx, dweight, dbias and dresidual in the dtypes of their inputs, where these need them.

    Args:
        ctx: of an autograd Function whose first inputs are x, weight, bias and residual; it has `dtypes` of
            the last three.
        gradients: what an engine has computed; without an activation, dresidual is not looked at.
        dy: the cotangent, which is dresidual then.
        activation, mask: of the call.
    """
    dx, dweight, dbias, dresidual = gradients
    _, of_weight, of_bias, of_residual, *_ = ctx.needs_input_grad
    weight_dtype, bias_dtype, residual_dtype = ctx.dtypes
    if not of_weight:
        dweight = None
    elif dweight is not None and dweight.dtype is not weight_dtype:
        dweight = dweight.to(weight_dtype)
    if not of_bias:
        dbias = None
    elif dbias is not None and dbias.dtype is not bias_dtype:
        dbias = dbias.to(bias_dtype)
    if not of_residual:
        return dx, dweight, dbias, None
    if activation is None:
        dresidual = cleared(dy, mask)
    if dresidual is not None and dresidual.dtype is not residual_dtype:
        dresidual = dresidual.to(residual_dtype)
    return dx, dweight, dbias, dresidual
