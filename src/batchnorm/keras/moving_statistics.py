"""How the moving statistics of a layer move: towards the batch's, in Keras's direction, biased."""

from __future__ import annotations

from typing import Any

from keras import ops

from batchnorm.statistics.batch import running_update

from .layer_protocol import KerasLayer
from .moments import Moments, union

Tensor = Any


def move(layer: KerasLayer, groups: Moments) -> None:
    """Move the moving statistics, and what counts batches.

        moving = momentum * moving + (1 - momentum) * batch

    Args:
        layer: built, in training.
        groups: moments of each group of samples, `[G, C]`. All together are the batch, unless the policy
            makes of each a batch of its own. A channel without a value (or with one, for a layer whose
            `small_batch` is "running") stays as it is, and so do all for a batch that is skipped.
    """
    is_one = groups.count.shape[0] == 1
    in_turn = layer.statistics.is_sequential and not is_one
    batch = groups if in_turn else Moments(*(v[0] for v in groups)) if is_one else union(groups)
    counted = batch.count >= (2 if layer.small_batch == "running" else 1)
    if layer.nonfinite == "skip":
        fine = ops.logical_and(ops.all(ops.isfinite(groups.mean)), ops.all(ops.isfinite(groups.var)))
        counted = ops.logical_and(counted, fine)
        if layer.skipped is not None:
            layer.skipped.assign(layer.skipped + ops.cast(ops.logical_not(fine), layer.skipped.dtype))
    moved = _in_turn if in_turn else _at_once

    def assign(moving: Any, values: Tensor, momentum: float) -> Tensor:
        new = moved(ops.cast(moving, values.dtype), values, counted, momentum)
        moving.assign(new)
        return new

    assign(layer.moving_mean, batch.mean, layer.momentum)
    if not layer.renorm:
        assign(layer.moving_variance, batch.var, layer.momentum)
    else:
        std = ops.sqrt(batch.var + layer.epsilon)
        assign(layer.renorm_mean, batch.mean, layer.renorm_momentum)
        assign(layer.renorm_stddev, std, layer.renorm_momentum)
        new = assign(layer.moving_stddev, std, layer.momentum)
        old = ops.cast(layer.moving_variance, new.dtype)
        layer.moving_variance.assign(ops.where(counted, ops.relu(new * new - layer.epsilon), old))
    if layer.batches is not None:
        layer.batches.assign(layer.batches + ops.cast(ops.any(counted), layer.batches.dtype))


def _at_once(old: Tensor, values: Tensor, counted: Tensor, momentum: float) -> Tensor:
    return ops.where(counted, running_update(old, values, 1 - momentum), old)


def _in_turn(old: Tensor, values: Tensor, counted: Tensor, momentum: float) -> Tensor:
    """Return the statistic `[C]` after all groups `[G, C]`, one after the other.

    Of k groups that count, the first is followed by k - 1 others:

        moving = momentum^k moving + Σ_g momentum^(number of those after g) (1 - momentum) group_g
    """
    one = ops.cast(counted, old.dtype)
    # On torch, Keras's `cumsum` makes float32 of float64; what it counts is exact in either.
    after = ops.sum(one, axis=0) - ops.cast(ops.cumsum(one, axis=0), old.dtype)
    weight = one * (1 - momentum) * ops.power(momentum * ops.ones_like(after), after)
    kept = ops.power(momentum * ops.ones_like(old), ops.sum(one, axis=0))
    return kept * old + ops.sum(weight * ops.where(counted, values, ops.zeros_like(values)), axis=0)
