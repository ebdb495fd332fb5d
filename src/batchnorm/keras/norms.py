"""Finds the batch normalizations of a Keras model, stock and ours, and says which of them are frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import keras

from batchnorm.statistics.batch import Batch
from batchnorm.statistics.policy import Policy

Norm: TypeAlias = keras.layers.BatchNormalization  # stock, ours or a subclass of either
Norms = Sequence[tuple[str, Norm]]  # with their names


def norms_within(layer: keras.layers.Layer, path: str = "") -> Iterator[tuple[str, Norm]]:
    """Yield (name, norm) for every batch normalization in `layer` or at it, each once, in the layer's order.

    Args:
        layer: any Keras layer or model; subclassed ones, wrappers and layers inside layers too.
        path: name of `layer` in front of the names within, such as `backbone/block_1`; "" for a whole model.
    """
    seen: set[int] = set()
    waiting = [(path, layer)]
    while waiting:
        name, current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, keras.layers.BatchNormalization):
            yield name or current.name, current
        # Keras lists a model's layers in public, but not the layers inside a wrapper or a user's own layer.
        within = current._flatten_layers(include_self=False, recursive=False)
        waiting += [(f"{name}/{inner.name}" if name else inner.name, inner) for inner in reversed(within)]


def is_frozen(norm: Norm) -> bool:
    """Whether a batch normalization uses and keeps its moving statistics in training."""
    return not (norm.trainable and measures(norm, training=True))


def measures(norm: Norm, training: bool) -> bool:
    """Whether a batch normalization takes the moments of its batch in this mode."""
    policy: Policy = getattr(norm, "statistics", None) or Batch()  # a stock layer has none
    return policy.measures(training)
