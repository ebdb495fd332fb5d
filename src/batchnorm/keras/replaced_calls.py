"""Replaces the calls of layers for a while: Keras has no hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

Call = Callable[..., Any]


@contextlib.contextmanager
def calls_replaced(
    layers: Iterable[keras.layers.Layer], wrap: Callable[[keras.layers.Layer, Call], Call]
) -> Iterator[None]:
    """Put `wrap(layer, its call)` in the place of layers' `call`, which is put back on any exit."""
    replaced: list[tuple[keras.layers.Layer, Call | None]] = []
    try:
        for layer in layers:
            replaced.append((layer, vars(layer).get("call")))
            # Past the layer's own __setattr__, which would track what it is given as part of the model.
            vars(layer)["call"] = wrap(layer, layer.call)
        yield
    finally:
        for layer, own in reversed(replaced):
            if own is None:
                vars(layer).pop("call", None)
            else:
                vars(layer)["call"] = own
