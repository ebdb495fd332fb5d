"""Moments of all replicas, by their counts: TensorFlow's strategies and torch.distributed.

On JAX a batch is global already (`keras.distribution` shards it, and XLA reduces over all of it).
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from .moments import Moments, union

Tensor = Any


def pooled(local: Moments) -> Moments:
    """Return the moments of the union of all replicas' values; differentiable, one collective each way.

    A replica may have any count, 0 included. Of groups of samples, group g of all replicas is one: they must
    have equally many.

    Source: Peng et al. 2018, arXiv:1711.07240.
    """
    everyone = _gathered(ops.stack(local))
    return local if everyone is None else union(Moments(*ops.unstack(everyone, 4, axis=1)))


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
