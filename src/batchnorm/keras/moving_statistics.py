"""Moves the moving statistics of a layer, and renormalizes by them."""

from __future__ import annotations

import keras
from keras import ops

from batchnorm.statistics.batch import running_update

from .moments import Moments, union
from .protocols import KerasLayer, Tensor


def move(layer: KerasLayer, groups: Moments) -> None:
    """Move the moving statistics, and count the batch.

        moving = momentum * moving + (1 - momentum) * batch

    Args:
        layer: built, in training.
        groups: moments of each group of samples, `[G, C]`. Together they are the batch, unless the policy
            makes each a batch of its own. A channel without a value (or with one, for a layer whose
            `small_batch` is "running") stays as it is, and so do all channels for a skipped batch.
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
    # Read before either moves; `renorm` gives all of its statistics the same values at first.
    starts = _is_initial(layer) if layer.warm_start else None

    def assign(moving: keras.Variable, values: Tensor, momentum: float) -> Tensor:
        new = moved(ops.cast(moving, values.dtype), values, counted, momentum, starts)
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


def _is_initial(layer: KerasLayer) -> Tensor:
    """Return which channels have the initial moving statistics, mean 0 and variance 1, `[C]` bool."""
    mean, var = ops.convert_to_tensor(layer.moving_mean), ops.convert_to_tensor(layer.moving_variance)
    return ops.logical_and(ops.equal(mean, 0), ops.equal(var, 1))


def _at_once(old: Tensor, values: Tensor, counted: Tensor, momentum: float, starts: Tensor | None) -> Tensor:
    """Return the statistic `[C]` after a batch; it is the batch's own where it `starts`."""
    new = running_update(old, values, 1 - momentum)
    return ops.where(counted, new if starts is None else ops.where(starts, values, new), old)


def _in_turn(old: Tensor, values: Tensor, counted: Tensor, momentum: float, starts: Tensor | None) -> Tensor:
    """Return the statistic `[C]` after all groups `[G, C]`, one after the other.

    Of k groups that count, the first is followed by k - 1 others:

        moving = momentum^k moving + Σ_g momentum^(number of those after g) (1 - momentum) group_g

    Where it `starts`, the first of them takes the place of `moving`.
    """
    one = ops.cast(counted, old.dtype)
    # On torch, Keras's `cumsum` makes float32 of float64; these counts are exact in either.
    after = ops.sum(one, axis=0) - ops.cast(ops.cumsum(one, axis=0), old.dtype)
    weight = one * (1 - momentum) * ops.power(momentum * ops.ones_like(after), after)
    kept = ops.power(momentum * ops.ones_like(old), ops.sum(one, axis=0))
    if starts is not None:
        is_first = one * ops.cast(ops.logical_and(starts, after == ops.sum(one, axis=0) - 1), old.dtype)
        weight = weight + is_first * kept
        kept = ops.where(ops.logical_and(starts, ops.any(counted, axis=0)), ops.zeros_like(kept), kept)
    return kept * old + ops.sum(weight * ops.where(counted, values, ops.zeros_like(values)), axis=0)


def renormalization(layer: KerasLayer, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return r and d of Keras's `renorm`, `[C]`; constants to the gradient.

        r = sqrt(var + epsilon) / renorm_stddev,    d = (mean - renorm_mean) / renorm_stddev,    both clipped

    Args:
        layer: built with `renorm`.
        mean, var: of the batch, `[C]`.

    Source: Ioffe 2017, arXiv:1702.03275, algorithm 1.
    """
    old_mean = ops.cast(layer.renorm_mean, mean.dtype)
    old_std = ops.maximum(ops.cast(layer.renorm_stddev, mean.dtype), layer.epsilon**0.5)
    bounds = layer.renorm_clipping
    r, d = ops.sqrt(var + layer.epsilon) / old_std, (mean - old_mean) / old_std
    if bounds.get("rmin") is not None:
        r = ops.maximum(r, bounds["rmin"])
    if bounds.get("rmax") is not None:
        r = ops.minimum(r, bounds["rmax"])
    if bounds.get("dmax") is not None:
        d = ops.clip(d, -bounds["dmax"], bounds["dmax"])
    return ops.stop_gradient(r), ops.stop_gradient(d)
