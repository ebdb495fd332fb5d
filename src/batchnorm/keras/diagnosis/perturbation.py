"""Runs a Keras model on perturbed samples, as at inference, and records what its layers make of them."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from batchnorm.doctor.measurements import Measured
from batchnorm.doctor.perturbation import (
    MASKS,
    SAMPLES,
    Call,
    Neighbours,
    Padding,
    Run,
    Values,
    compared,
    padding_of,
)
from batchnorm.keras.calibration.batches import Inputs, samples
from batchnorm.keras.norms import norms_within
from batchnorm.keras.replaced_calls import Call as LayerCall
from batchnorm.keras.replaced_calls import calls_replaced

from .passes import Batch, as_values, innermost, outputs_of


def perturb(model: keras.Model, batches: list[Batch], measured: Measured) -> None:
    """Add to `measured` how predictions depend on neighbours and on padding; the model is as before."""
    x = next((x for x, _ in batches if samples(x) >= 2), None)
    if x is None:
        measured.unchecked.append("neighbours in a batch: every batch has one sample")
        return
    size = min(SAMPLES, samples(x))
    small = _each(x, lambda values: values[:size])
    first, neighbours = _run(model, small), Neighbours(size)
    second = _run(model, _each(small, neighbours.changed))
    measured.mates = compared(first, second, neighbours.view)
    measured.forwards += 2 * size / measured.samples
    padding = _padding(model, small)
    if padding is None:
        return
    try:
        if not padding.is_least:
            first = _run(model, _each(small, padding.trimmed))
        second = _run(model, _each(small, padding.changed))
    except Exception as error:  # a functional model may be built for one length
        told = str(error).strip().partition("\n")[0]
        measured.unchecked.append(f"padding: the model raises {type(error).__name__}: {told}")
        return
    measured.padding = *compared(first, second, padding.view), padding.is_given
    measured.forwards += (1 if padding.is_least else 2) * size / measured.samples


def _each(x: Inputs, change: Any) -> Inputs:
    """Return inputs with the values of each leaf changed."""
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else change(ops.convert_to_numpy(leaf)), x
    )


def _padding(model: keras.Model, x: Inputs) -> Padding | None:
    """Return the padding of a batch; None where no sample is seen to have any.

    Beside the input, whole numbers `[N]` are lengths, and truth values `[N, L]`, or an input that is called a
    mask, are a mask.
    """
    leaves = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    names = sorted(x) if isinstance(x, dict) else [of.name for of in getattr(model, "inputs", None) or ()]
    named = dict(
        zip(names if len(names) == len(leaves) else map(str, range(len(leaves))), leaves, strict=True)
    )
    masks = {n: of for n, of in named.items() if n in MASKS or (of.dtype.kind == "b" and of.ndim == 2)}
    others = [of for name, of in named.items() if name not in masks]
    given = next((of for of in others if of.ndim > 1), None)
    lengths = next((of for of in others if of.ndim == 1 and of.dtype.kind in "iu" and of.min() > 0), None)
    return None if given is None else padding_of(given, lengths, next(iter(masks.values()), None))


def _run(model: keras.Model, x: Inputs) -> Run:
    """Run the model and record every layer."""
    names = {id(norm): name for name, norm in norms_within(model)}
    calls: list[Call] = []

    def traced(layer: keras.layers.Layer, call: LayerCall) -> LayerCall:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            given, made = (_values(value) for value in (args, result))
            calls.append(Call(names.get(id(layer), layer.name), given, made))
            return result

        return run

    with calls_replaced(innermost(model), traced):
        outputs = outputs_of(model, x, [])
    return Run(_values(outputs), calls)


def _values(value: object) -> list[Values]:
    return [as_values(leaf) for leaf in keras.tree.flatten(value) if ops.is_tensor(leaf)]
