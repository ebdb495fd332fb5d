"""Pools the moments of all replicas by their counts: TensorFlow's strategies and torch.distributed.

On JAX a batch is global already (`keras.distribution` shards it, and XLA reduces over all of it).
"""

from __future__ import annotations

import keras
from keras import ops

from batchnorm.errors import RankError

from .moments import Moments, union
from .protocols import Tensor


def pooled(local: Moments, label: str) -> Moments:
    """Return the moments of the union of all replicas' values; differentiable, one collective each way.

    A replica may have any count, 0 included. Group g of samples is the union of group g of all replicas, so
    all replicas must have the same number of groups.

    Args:
        local: moments of this replica.
        label: names the layer in errors; on torch, the same on all ranks.

    Raises:
        RankError: (a RuntimeError, on torch) a rank did not come to this layer in time, or came to another.

    Source: Peng et al. 2018, arXiv:1711.07240.
    """
    everyone = _gathered(ops.stack(local), label)
    return local if everyone is None else union(Moments(*ops.unstack(everyone, 4, axis=1)))


def _gathered(values: Tensor, label: str) -> Tensor | None:
    """Return every replica's `values`, `[replicas, *values.shape]`, or None where there is one replica."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return _gathered_by_strategy(values)
    if backend == "torch":
        return _gathered_by_process_group(values, label)
    return None


def _gathered_by_strategy(values: Tensor) -> Tensor | None:
    """Return the values of all replicas of TensorFlow's current strategy."""
    import tensorflow as tf

    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return None
    # A sum of tables, each zero but for its replica's row: the gradient is a sum too, and XLA compiles it.
    own = tf.range(replica.num_replicas_in_sync) == replica.replica_id_in_sync_group
    own = tf.reshape(own, [-1] + [1] * len(values.shape))
    rows = tf.where(own, values[None], tf.zeros_like(values)[None])
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, rows)


def _gathered_by_process_group(values: Tensor, label: str) -> Tensor | None:
    """Return the values of all ranks of torch.distributed's default group."""
    from batchnorm.torch import functional

    try:
        return functional.gather_ranks(values, f"{label} forward")
    except RankError as error:
        raise RankError(str(error)) from error  # Keras makes a new one of the message, without the layer
