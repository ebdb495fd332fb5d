"""Runs the layer's call by `keras.ops`: on any backend, with any policy and mask."""

from __future__ import annotations

from keras import ops

from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import Chosen, Known
from batchnorm.statistics.synced import Synced

from .batch_layout import Parts, split
from .moments import Moments, moments, normalize, wide
from .moving_statistics import move, renormalization
from .protocols import KerasLayer, Tensor
from .synchronized import pooled


def call(layer: KerasLayer, inputs: Tensor, axis: int, by_batch: bool, valid: Tensor | None) -> Tensor:
    """Return the layer's output, and move its statistics.

    Args:
        layer: built.
        inputs: `[N, C, *S]`, with channels on `axis`, 0 or above.
        axis: the channel axis.
        by_batch: the layer is in training.
        valid: bool, broadcasts against `inputs`, True = the value counts; None = all do.

    Raises:
        RankError: (a RuntimeError, on torch) as `synchronized.pooled`.
    """
    x = wide(inputs)
    policy = layer.statistics
    if not policy.measures(by_batch):
        parts = split(x, None, axis, None)
        mean, var = parts.per_channel(layer.moving_mean), parts.per_channel(layer.moving_variance)
        found = used = Moments(ops.ones_like(var), mean, ops.zeros_like(mean), var)
        rstd = ops.rsqrt(var + layer.epsilon)
    else:
        parts = split(x, valid, axis, policy.groups(by_batch))
        found = moments(parts.x, parts.axes, parts.valid)
        if by_batch and (layer.synchronized or isinstance(policy, Synced)):
            found = pooled(found, layer._label)
        chosen = _chosen(layer, parts, found, by_batch)
        used, rstd = found._replace(delta=chosen.mean), chosen.rstd
    gamma = parts.per_channel(layer.gamma) if layer.scale else 1.0
    beta = parts.per_channel(layer.beta) if layer.center else ops.zeros_like(found.var)
    if by_batch and layer.renorm:
        mean, var = (ops.reshape(value, (-1,)) for value in (found.mean, found.var))
        r, d = (parts.per_channel(value) for value in renormalization(layer, mean, var))
        gamma, beta = gamma * r, gamma * d + beta
    if policy.moves(by_batch):
        channels = layer.moving_mean.shape[0]
        move(layer, Moments(*(ops.reshape(value, (-1, channels)) for value in found)))
    y = parts.joined(normalize(parts.x, used, gamma * rstd, beta, parts.axes), x)
    return ops.cast(layer.activation(y), layer.compute_dtype)


def _chosen(layer: KerasLayer, parts: Parts, found: Moments, by_batch: bool) -> Chosen:
    """Return the statistics that the policy chooses, its mean as the distance from `found.shift`.

    A policy mixes and compares means, so their origin makes no difference to it, but it does to float32:
    relative to the batch's mean they keep their digits. The policy's moments are per value here: count 1.
    """
    policy, batch = layer.statistics, PooledMoments(1.0, found.delta, found.var)
    is_lenient = by_batch and layer.small_batch == "running"
    if policy.is_plain(by_batch) and not is_lenient:
        return policy.choose(batch, Known(None, None, None, 1.0, layer.epsilon), by_batch, ops)
    known = Known(
        parts.per_channel(layer.moving_mean) - found.shift,
        parts.per_channel(layer.moving_variance),
        None if layer.batches is None else ops.cast(layer.batches, parts.x.dtype),
        _samples(parts),
        layer.epsilon,
    )
    chosen = policy.choose(batch, known, by_batch, ops)
    if not is_lenient:
        return chosen
    enough = found.count >= 2
    given = ops.rsqrt(parts.per_channel(layer.moving_variance) + layer.epsilon)
    return chosen._replace(
        mean=ops.where(enough, chosen.mean, known.mean), rstd=ops.where(enough, chosen.rstd, given)
    )


def _samples(parts: Parts) -> Tensor:
    """Return the number of samples with a valid value, which may differ between channels."""
    samples, *others = parts.axes
    if parts.valid is None:
        return ops.cast(ops.shape(parts.x)[samples], parts.x.dtype)
    some = ops.any(parts.valid, axis=tuple(others), keepdims=True) if others else parts.valid
    shape = list(ops.shape(some))  # a mask may have length 1 where x has samples
    shape[samples] = ops.shape(parts.x)[samples]
    some = ops.broadcast_to(some, shape)
    return ops.sum(ops.cast(some, parts.x.dtype), axis=samples, keepdims=True)
