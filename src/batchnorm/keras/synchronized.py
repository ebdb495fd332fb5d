"""Moments of all replicas, by their counts: TensorFlow's strategies and torch.distributed.

On JAX a batch is global already (`keras.distribution` shards it, and XLA reduces over all of it).
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from .moments import Moments

Tensor = Any


def pooled(local: Moments) -> Moments:
    """Return the moments of the union of all replicas' values; differentiable, one collective each way.

    With n = Σ n_r over replicas r, and each mean_r = shift_r + delta_r kept as a pair:

        mean = Σ n_r mean_r / n        var = Σ n_r (var_r + (mean_r - mean)²) / n

    A replica may have any count, 0 included.

    Source: Chan, Golub & LeVeque, The American Statistician 37 (1983); Peng et al. 2018, arXiv:1711.07240.
    """
    packed = ops.stack(local)
    everyone = _gathered(packed)
    if everyone is None:
        return local
    count, shift, delta, var = ops.unstack(everyone, 4, axis=1)
    total = ops.sum(count, axis=0)
    share = count / ops.maximum(total, 1.0)
    center = ops.stop_gradient(ops.sum(share * shift, axis=0))
    apart = (shift - center) + delta
    delta = ops.sum(share * apart, axis=0)
    var = ops.sum(share * (var + ops.square(apart - delta)), axis=0)
    return Moments(total, center, delta, var)


def _gathered(values: Tensor) -> Tensor | None:
    """Return every replica's `values`, `[replicas, *values.shape]`, or None where there is one replica."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return _gathered_by_strategy(values)
    if backend == "torch":
        return _gathered_by_process_group(values)
    return None


def _gathered_by_strategy(values: Tensor) -> Tensor | None:
    import tensorflow as tf

    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return None
    # A sum over rows that are zero but for one's own: its gradient is a sum too, and XLA compiles it.
    own = tf.range(replica.num_replicas_in_sync) == replica.replica_id_in_sync_group
    own = tf.reshape(own, [-1] + [1] * len(values.shape))
    rows = tf.where(own, values[None], tf.zeros_like(values)[None])
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, rows)


def _gathered_by_process_group(values: Tensor) -> Tensor | None:
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return None
    from torch.distributed.nn.functional import all_reduce

    own = torch.arange(distributed.get_world_size(), device=values.device) == distributed.get_rank()
    rows = torch.where(own.view(-1, *[1] * values.dim()), values[None], torch.zeros_like(values)[None])
    return all_reduce(rows)  # type: ignore[no-untyped-call]
