"""Computes batch normalization by plain differentiable torch operations.

torch itself differentiates this form, to any order and in any mode. It serves double backward, forward-mode
differentiation and the transforms of `torch.func`, where a hand-written gradient would need one of its own.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.kernels.interface import wide_dtype
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import Chosen

from .call import Call, Normalized, cleared


class Step(Protocol):
    """The part of `policy_step.PolicyStep` that runs between moments and normalization."""

    def share(
        self, batch: PooledMoments, *, differentiable: bool = False
    ) -> tuple[PooledMoments, float | Tensor]:
        """Return the moments of all ranks that share, and the number of their samples."""

    def choose(self, batch: PooledMoments, samples: float | Tensor) -> Chosen:
        """Return what the call normalizes by."""


def normalize(
    call: Call,
    given: tuple[Tensor, Tensor] | None = None,
    step: Step | None = None,
    *,
    exporting: bool = False,
) -> Normalized:
    """Return y = activation(weight * x̂ + bias + residual), 0 where masked.

    Args:
        call: the call.
        given: mean and rstd to normalize by, `[1, C]` each, constants.
        step: the policy that chooses them. Without either: by the moments of each group.
        exporting: whether a graph is recorded for a runtime. Activations are then computed in float32: ONNX
            Runtime has no elu in float64.
    """
    x, mask = call.x, call.mask
    wide = cleared(x.to(wide_dtype(x.device)), mask)
    batch = None
    if given is not None:
        mean, rstd = given
        z = (wide - _spread(mean, x)) * _spread(rstd, x)
    else:
        batch, centred, groups = _moments(wide, mask, call.group_size)
        if step is None:
            var = batch.m2 / (batch.count + (batch.count == 0))
            z = centred * _spread((var + call.eps).rsqrt(), x, groups)
        else:
            batch, samples = step.share(batch, differentiable=True)
            chosen = step.choose(batch, samples)
            z = (wide - _spread(chosen.mean, x, groups)) * _spread(chosen.rstd, x, groups)
    z = z if call.weight is None else z * _spread(call.weight, x)
    z = z if call.bias is None else z + _spread(call.bias, x)
    z = z if call.residual is None else z + cleared(call.residual, mask)
    z = z.to(torch.promote_types(x.dtype, torch.float32)) if exporting else z
    y = z if call.activation is None else ACTIVATIONS[call.activation].value(z)
    return Normalized(cleared(y, mask).to(x.dtype), batch)


def _spread(values: Tensor, x: Tensor, groups: Tensor | None = None) -> Tensor:
    """Return `[C]`, `[1, C]`, or `[G, C]` with each sample's group, shaped to broadcast against x."""
    if groups is not None:
        values = values.index_select(0, groups)
    return values.view(*(values.shape if values.dim() > 1 else (1, -1)), *[1] * (x.dim() - 2))


def _moments(
    wide: Tensor, counted: Tensor | None, size: int | None
) -> tuple[PooledMoments, Tensor, Tensor | None]:
    """Return the moments of each group; x - mean, 0 where masked; each sample's group if there are many."""
    samples, positions = wide.shape[0], math.prod(wide.shape[2:])
    groups, number = None, 1
    if size is not None and size < samples:
        number = -(-samples // size)
        groups = torch.arange(samples, device=wide.device) // size
    if counted is None and groups is None:
        count: float | Tensor = 1.0 * samples * positions  # not float(): an exporter's size may be a symbol
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
    call: Call,
    dy: Tensor,
    given: tuple[Tensor, Tensor] | None = None,
    step: Step | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients by operations that torch can differentiate and transform in their turn.

    Double backward needs them, and a backward within a `vmap` or forward mode of a forward outside of it.

    Args:
        ctx: of an autograd Function whose first inputs are x, weight, bias and residual; it has `dtypes`
            of the last three.
        call: the call, of saved tensors.
        dy: the cotangent.
        given, step: as of `normalize`.
    """
    if call.bias is None and ctx.dtypes[1] is not None:
        # Without an activation the bias is not saved: any value of it gives the same gradient.
        channels = call.x.shape[1]
        zeros = torch.zeros(channels, dtype=ctx.dtypes[1], device=call.x.device, requires_grad=True)
        call = call._replace(bias=zeros)
    with torch.enable_grad():
        y = normalize(call, given, step).y
    inputs = (call.x, call.weight, call.bias, call.residual)
    wanted = {
        index: tensor
        for index, (tensor, need) in enumerate(zip(inputs, ctx.needs_input_grad[:4], strict=True))
        if need and tensor is not None
    }
    found = torch.autograd.grad(y, list(wanted.values()), dy, create_graph=torch.is_grad_enabled())
    by_index = dict(zip(wanted, found, strict=True))
    return tuple(by_index.get(index) for index in range(4))
