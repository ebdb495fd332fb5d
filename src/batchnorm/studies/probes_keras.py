"""Finds the layers of a Keras network, and measures what goes into them; the network stays as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from batchnorm.keras.replaced_calls import Call, calls_replaced

Array = npt.NDArray[Any]

_WEIGHT_LAYERS = (
    *(keras.layers.Dense, keras.layers.EinsumDense),
    *(keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D),
    *(keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose),
    *(keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D),
    *(keras.layers.SeparableConv1D, keras.layers.SeparableConv2D),
)


def layers_of(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns every layer of a model, those inside other layers too, each once and in order."""

    def within(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
        # Private: only models list their layers in public. One level at a time: all at once, it turns the
        # order of inner layers round.
        for inner in layer._flatten_layers(include_self=False, recursive=False):
            yield inner
            yield from within(inner)

    return list(dict.fromkeys(within(model)))


def weight_layers(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """Returns the dense and convolution layers of a model by name; a name that comes again gets a number."""
    named: dict[str, keras.layers.Layer] = {}
    for layer in layers_of(model):
        if isinstance(layer, _WEIGHT_LAYERS):
            again = sum(name.partition("#")[0] == layer.name for name in named)
            named[f"{layer.name}#{again + 1}" if again else layer.name] = layer
    return named


def kernels(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the trained weights of a dense or convolution layer without its bias; some layers have two."""
    return [variable for variable in layer.trainable_variables if variable.name.endswith("kernel")]


def batch_norms(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the batch normalizations of a model that are not frozen, so that they use batch statistics."""
    norms = (layer for layer in layers_of(model) if isinstance(layer, keras.layers.BatchNormalization))
    return [norm for norm in norms if norm.trainable]


@contextlib.contextmanager
def state_kept(model: keras.Model) -> Iterator[None]:
    """Restores moving statistics, and all else that a forward pass may change, on any exit."""
    # Copied: nothing promises that the array does not share the variable's memory.
    kept = [
        (variable, np.array(keras.ops.convert_to_numpy(variable)))
        for variable in model.non_trainable_variables
    ]
    try:
        yield
    finally:
        for variable, value in kept:
            variable.assign(value)


@contextlib.contextmanager
def batch_statistics(model: keras.Model) -> Iterator[None]:
    """Normalizes by batch statistics where the model is called with `training=False`, so without dropout.

    A frozen layer keeps its moving statistics, in training as here.
    """

    def in_training(_: keras.layers.Layer, call: Call) -> Call:
        return lambda *inputs, **options: call(*inputs, **{**options, "training": True})

    with state_kept(model), calls_replaced(batch_norms(model), in_training):
        yield


def input_spread(
    model: keras.Model, x: Array | list[Array] | dict[str, Array]
) -> dict[str, tuple[float, float]]:
    """Returns mean and standard deviation of each dense and convolution layer's input over a batch.

    Per unit (or channel) over the batch and positions, then averaged over units. Batch normalizations use the
    statistics of this batch, as in training; nothing is dropped.

    Args:
        model: any.
        x: a batch of examples; the same one at every call makes values comparable over time.
    """
    layers = weight_layers(model)
    names = {id(layer): name for name, layer in layers.items()}
    spread: dict[str, tuple[float, float]] = {}

    def look(layer: keras.layers.Layer, call: Call) -> Call:
        unit_axis = 1 if getattr(layer, "data_format", None) == "channels_first" else -1

        def watched(inputs: Any, *more: Any, **options: Any) -> Any:
            values = np.moveaxis(keras.ops.convert_to_numpy(inputs), unit_axis, -1)
            values = values.reshape(-1, values.shape[-1]).astype(np.float64)
            spread[names[id(layer)]] = (float(values.mean()), float(values.std(axis=0).mean()))
            return call(inputs, *more, **options)

        return watched

    with calls_replaced(layers.values(), look), batch_statistics(model):
        model(x, training=False)
    return spread
