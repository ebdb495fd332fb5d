"""The batch normalizations of a Keras model: stock and ours, at any nesting, by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras


def is_norm(layer: Any) -> bool:
    """Whether `layer` is a batch normalization, stock or ours or a subclass of either."""
    return isinstance(layer, keras.layers.BatchNormalization)


def norms_within(layer: Any, path: str = "") -> Iterator[tuple[str, Any]]:
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
        if is_norm(current):
            yield name or current.name, current
        # Keras lists a model's layers in public, but not the layers inside a wrapper or a user's own layer.
        within = current._flatten_layers(include_self=False, recursive=False)
        waiting += [(f"{name}/{inner.name}" if name else inner.name, inner) for inner in reversed(within)]
