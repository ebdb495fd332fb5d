"""Models with random weights, and how a folded copy is held to the original."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np

from batchnorm.keras.fold import fold
from batchnorm.keras.norms import norms_within

from .gradients import Array

# float32's eps is 1.2e-7. Folded weights round elsewhere than the pair they replace.
CLOSE = 1e-5


def randomized(model: Any) -> Any:
    """Draw every weight anew: means away from 0, variances and scales away from 1, some scales negative."""
    random = np.random.default_rng(7)
    for variable in model.weights:
        if variable.dtype.startswith(("int", "uint")):
            continue
        values = random.standard_normal(variable.shape)
        if variable.name == "moving_variance":
            values = 0.2 + 2 * random.random(variable.shape)
        elif "kernel" in variable.name:
            values = values / np.sqrt(max(1, np.prod(variable.shape[:-1])))
        elif variable.name in ("gamma", "moving_mean"):
            values = values + 0.7
        variable.assign(values.astype("float32"))
    return model


def made(kind: Any, *args: Any, **options: Any) -> Any:
    """A layer whose weights begin as zeros: on JAX, drawing them is compiled anew for every shape."""
    drawn = ("kernel_initializer", "depthwise_initializer", "pointwise_initializer")
    takes = inspect.signature(kind).parameters
    return kind(*args, **options, **{name: "zeros" for name in drawn if name in takes})


def dense(units: int, **options: Any) -> Any:
    return made(keras.layers.Dense, units, **options)


def sequential(*layers: Any, shape: tuple[int | None, ...] = (5,)) -> Any:
    return randomized(keras.Sequential([keras.Input(shape), *layers]))


def functional(inputs: Any, outputs: Any) -> Any:
    return randomized(keras.Model(inputs, outputs))


def draw(shape: tuple[int, ...], seed: int = 3) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def outputs(model: Any, x: Any) -> list[Array]:
    """Return the outputs of a model at inference, flat."""
    return [
        keras.ops.convert_to_numpy(value).astype(np.float64)
        for value in keras.tree.flatten(model(x, training=False))
    ]


def assert_same(model: Any, copy: Any, x: Any, tolerance: float = CLOSE) -> None:
    """Both give the same outputs, relative to each output's largest value."""
    old, new = outputs(model, x), outputs(copy, x)
    assert len(old) == len(new)
    for before, after in zip(old, new, strict=True):
        assert before.shape == after.shape
        assert np.isfinite(before).all()
        scale = np.abs(before).max()
        assert scale > 1e-3  # or the comparison says nothing
        assert np.abs(after - before).max() <= tolerance * scale


def folded(model: Any, x: Any, left: int = 0, tolerance: float = CLOSE) -> Any:
    """Return the copy, with `left` normalizations in it and the outputs of the original on x."""
    copy = fold(model, verbose=0)
    assert len(list(norms_within(copy))) == left
    assert_same(model, copy, x, tolerance)
    return copy
