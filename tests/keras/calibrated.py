"""Shared by the tests of calibration: data, a network, its state, and statistics by NumPy."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray

from batchnorm.keras import BatchNormalization

Array = NDArray[Any]


def numbers(*shape: int, offset: float = 0.0, axis: int = -1) -> Array:
    """float32, every channel with a mean and spread of its own."""
    rng = np.random.default_rng(sum(shape))
    channels = [1] * len(shape)
    channels[axis] = -1
    place = np.arange(shape[axis]).reshape(channels)
    return (rng.normal(size=shape) * (1 + place) + 3 * place + offset).astype("float32")


def network() -> keras.Sequential:
    """Two normalizations, ours and Keras's, with a dropout between; compiled, weights away from 1 and 0."""
    model = keras.Sequential(
        [
            keras.Input((5,)),
            BatchNormalization(name="first", gamma_initializer="random_normal", beta_initializer="ones"),
            layers.Dense(6, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(3),
            layers.BatchNormalization(name="second"),
        ]
    )
    model.compile("adam", "mse")
    return model


def value(variable: Any) -> Array:
    return np.array(keras.ops.convert_to_numpy(variable.value))


def wide(variable: Any) -> Array:
    return value(variable).astype(np.float64)


def state(model: keras.Model) -> dict[str, Any]:
    """Everything that a calibration must not change, the moving statistics of which it may."""
    every = model._flatten_layers()
    return {
        "values": {f"{index} {v.path}": value(v) for index, v in enumerate(model.variables)},
        "optimizer": [value(v) for v in model.optimizer.variables] if model.compiled else [],
        "trainable": [layer.trainable for layer in every],
        "patched": [layer.name for layer in every if "call" in layer.__dict__],
        "functions": (model.train_function, model.test_function, model.predict_function),
        "compiled": (model.compiled, model.run_eagerly, model.jit_compile),
        "modes": [m.training for m in model.modules()] if hasattr(model, "modules") else [],
        "losses": len(model.losses),
    }


def assert_same_state(found: dict[str, Any], before: dict[str, Any]) -> None:
    assert found["patched"] == []
    np.testing.assert_equal(found, before)


def assert_statistics(norm: Any, received: Array, axis: int = -1) -> None:
    """The moving statistics are those of all of `received` in float64, up to the rounding of float32."""
    axes = tuple(dim for dim in range(received.ndim) if dim != axis % received.ndim)
    mean, var = received.mean(axes, dtype=np.float64), received.var(axes, dtype=np.float64)
    error = np.abs(wide(norm.moving_mean) - mean)
    assert np.all(error <= 6e-8 * np.abs(mean) + 2e-6 * np.sqrt(var)), error
    np.testing.assert_allclose(wide(norm.moving_variance), var, rtol=4e-6)


def normalized(norm: Any, x: Array) -> Array:
    """Return the moving statistics that training's formula gives for a batch, in float64."""
    found = (x - x.mean(0)) / np.sqrt(x.var(0) + norm.epsilon)
    return found * wide(norm.gamma) + wide(norm.beta)
