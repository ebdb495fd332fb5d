"""Batch normalization as plain differentiable torch operations.

torch itself differentiates this form, to any order and in any mode: it serves double backward, forward-mode
differentiation and the transforms of `torch.func`, where a hand-written gradient would need one of its own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.kernels.interface import wide_dtype
from batchnorm.statistics.moments import PooledMoments

from .plan import Plan


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


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
    *,
    exporting: bool = False,
) -> Normalized:
    """Return y = activation(weight * x̂ + bias + residual), 0 where masked.

    Args:
        x: `[N, C, *S]`.
        plan: by which statistics.
        exporting: for a runtime, which has activations in float32 (ONNX Runtime has no elu in float64).
    """
    wide = cleared(x.to(wide_dtype(x.device)), plan.mask)
    batch = None
    if plan.given is not None:
        mean, rstd = plan.given
        z = (wide - _spread(mean, x)) * _spread(rstd, x)
    else:
        batch, centred, groups = _moments(wide, plan)
        if plan.choice is None:
            var = batch.m2 / (batch.count + (batch.count == 0))
            z = centred * _spread((var + plan.eps).rsqrt(), x, groups)
        else:
            chosen = plan.choice.choose(*(shared := plan.choice.share(batch, differentiable=True)))
            batch = shared[0]
            z = (wide - _spread(chosen.mean, x, groups)) * _spread(chosen.rstd, x, groups)
    z = z if weight is None else z * _spread(weight, x)
    z = z if bias is None else z + _spread(bias, x)
    z = z if residual is None else z + cleared(residual, plan.mask)
    z = z.to(torch.promote_types(x.dtype, torch.float32)) if exporting else z
    y = z if plan.activation is None else ACTIVATIONS[plan.activation].value(z)
    return Normalized(cleared(y, plan.mask).to(x.dtype), batch)


def cleared(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return values `[N, C, *S]` with 0 where the mask leaves them out, whatever was there."""
    return values if mask is None else torch.where(mask.unsqueeze(1), values, 0.0).to(values.dtype)


def _spread(values: Tensor, x: Tensor, groups: Tensor | None = None) -> Tensor:
    """Return `[C]`, `[1, C]`, or `[G, C]` with each sample's group, shaped to broadcast against x."""
    if groups is not None:
        values = values.index_select(0, groups)
    return values.view(*(values.shape if values.dim() > 1 else (1, -1)), *[1] * (x.dim() - 2))


def _moments(wide: Tensor, plan: Plan) -> tuple[PooledMoments, Tensor, Tensor | None]:
    """Return the moments of each group; x - mean, 0 where masked; each sample's group if there are many."""
    samples, positions = wide.shape[0], math.prod(wide.shape[2:])
    size = plan.group_size
    groups, number = None, 1
    if size is not None and size < samples:
        number = -(-samples // size)
        groups = torch.arange(samples, device=wide.device) // size
    counted = plan.mask
    if counted is None and groups is None:
        count: float | Tensor = 1.0 * samples * positions  # not float(): of an exporter it may be a symbol
    else:
        per_sample = wide.new_ones(samples, 1) * positions
        if counted is not None:
            per_sample = counted.unsqueeze(1).flatten(1).sum(1, keepdim=True).to(wide.dtype)
        count = _total(per_sample, groups, number)
    divisor = count + (count == 0)
    spatial = list(range(2, wide.dim()))

    def total(values: Tensor) -> Tensor:
        return _total(values.sum(spatial) if spatial else values, groups, number)

    mean = total(wide) / divisor
    centred = cleared(wide - _spread(mean, wide, groups), counted)
    return PooledMoments(count, mean, total(centred.square())), centred, groups


def _total(per_sample: Tensor, groups: Tensor | None, number: int) -> Tensor:
    """Return the sums `[N, C]` of samples, added up within each group: `[G, C]`."""
    if groups is None:
        return per_sample.sum(0, keepdim=True)
    return per_sample.new_zeros(number, per_sample.shape[1]).index_add(0, groups, per_sample)


def gradients(
    ctx: Any,
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Plan,
) -> tuple[Tensor | None, ...]:
    """Return the gradients by operations that torch can differentiate and transform in their turn.

    That is for double backward; and for a backward in a `vmap` or in forward mode, of a forward outside it.

    Args:
        ctx: of an autograd Function whose inputs 1 to 4 are x, weight, bias and residual; it has `dtypes` of
            the last three.
    """
    if bias is None and ctx.dtypes[1] is not None:
        # Not kept, as no activation follows: any value gives the same gradient.
        bias = torch.zeros(x.shape[1], dtype=ctx.dtypes[1], device=x.device, requires_grad=True)
    with torch.enable_grad():
        y = normalize(x, weight, bias, residual, plan).y
    inputs = [x, weight, bias, residual]
    wanted = {
        index: tensor
        for index, (tensor, need) in enumerate(zip(inputs, ctx.needs_input_grad[1:5], strict=True))
        if need and tensor is not None
    }
    found = torch.autograd.grad(y, list(wanted.values()), dy, create_graph=torch.is_grad_enabled())
    by_index = dict(zip(wanted, found, strict=True))
    return tuple(by_index.get(index) for index in range(4))
