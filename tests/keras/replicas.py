"""A step of a layer on the replicas of one of TensorFlow's strategies."""

from __future__ import annotations

from typing import Any

from .gradients import Array


def step_on(
    strategy: Any, layer: Any, xs: list[Array], dys: list[Array], masks: list[Array] | None
) -> list[list[Array]]:
    """Return y, dx, dgamma and dbeta, of each replica."""
    import tensorflow as tf

    def per_replica(values: list[Array]) -> Any:
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(values[context.replica_id_in_sync_group])
        )

    @tf.function
    def step(x: Any, dy: Any, mask: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
        return y, tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)

    given = None if masks is None else per_replica(masks)
    y, gradients = strategy.run(step, (per_replica(xs), per_replica(dys), given))
    return [[v.numpy() for v in strategy.experimental_local_results(t)] for t in (y, *gradients)]
