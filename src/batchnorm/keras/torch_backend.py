"""Runs the layer's call by batchnorm's own kernels, on the torch backend."""

from __future__ import annotations

import keras
import torch
from keras import ops

from batchnorm.conventions import ACTIVATIONS
from batchnorm.statistics.moments import PooledMoments
from batchnorm.torch import functional

from .moments import Moments
from .moving_statistics import move, renormalization
from .protocols import KerasLayer

# Keras's activation, with its defaults -> name of the same function fused into the kernels.
_FUSED = {getattr(keras.activations, theirs): ours for ours, theirs in ACTIVATIONS.items()}
_HALVES = (torch.float16, torch.bfloat16)


def call(layer: KerasLayer, inputs: torch.Tensor, axis: int, by_batch: bool) -> torch.Tensor:
    """Return the layer's output, and move its statistics.

    Args:
        layer: built.
        inputs: `[N, C, *S]`, with channels on `axis`, 0 or above.
        axis: the channel axis.
        by_batch: the layer is in training.
    """
    x = inputs.movedim(axis, 1) if inputs.dim() > 1 else inputs.unsqueeze(0)
    if x.dtype not in _HALVES:  # 16-bit inputs stay: kernels compute in a wide dtype
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = _parameter(layer.gamma, x) if layer.scale else None
    bias = _parameter(layer.beta, x) if layer.center else None
    activation = _FUSED.get(layer.activation)
    policy = layer.statistics
    running = {"running_mean": layer.moving_mean.value, "running_var": layer.moving_variance.value}
    if policy.measures(by_batch):
        if by_batch and layer.renorm:
            weight, bias = _renormalized(layer, x, weight, bias)
        y, found = functional.normalize_batch(
            x,
            weight,
            bias,
            layer.epsilon,
            activation=activation,
            statistics=policy.in_order(),  # the layer has shuffled the samples
            training=by_batch,
            batches=None if layer.batches is None else layer.batches.value,
            **running,
        )
        if policy.moves(by_batch):
            move(layer, _of_groups(found))
    else:
        y = functional.batch_norm(
            x, weight=weight, bias=bias, eps=layer.epsilon, activation=activation, **running
        )
    y = y.movedim(1, axis) if inputs.dim() > 1 else y.squeeze(0)
    if activation is None:  # in the inputs' own layout: softmax and PReLU, for two, are not elementwise
        y = layer.activation(y)
    output: torch.Tensor = ops.cast(y, layer.compute_dtype)
    return output


def _of_groups(found: PooledMoments) -> Moments:
    """Return moments `[C]` or `[G, C]` as `[G, C]`."""
    mean, m2 = (values.reshape(-1, values.shape[-1]) for values in (found.mean, found.m2))
    count = torch.zeros_like(mean) + found.count
    return Moments(count, mean, torch.zeros_like(mean), m2 / count.clamp(min=1))


def _parameter(variable: keras.Variable, x: torch.Tensor) -> torch.Tensor:
    """Return the value of gamma or beta in a dtype that goes with x; 16-bit inputs take float32 as it is."""
    value: torch.Tensor = variable.value
    fits = x.dtype in _HALVES and value.dtype == torch.float32
    return value if fits else value.to(x.dtype)


def _renormalized(
    layer: KerasLayer, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias with r and d in them: (x̂ r + d) weight + bias."""
    found = functional.moments(x)
    narrow = torch.float32 if x.dtype in _HALVES else x.dtype
    corrections = renormalization(layer, found.mean, found.m2 / found.count.clamp(min=1))
    r, d = (ops.cast(value, narrow) for value in corrections)
    if weight is not None:
        r, d = r * weight, d * weight
    return r, d if bias is None else d + bias
