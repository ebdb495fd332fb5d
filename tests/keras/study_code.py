"""A user's own data and Keras networks as source text, for tests that write them to a file."""

from __future__ import annotations

from pathlib import Path

_OWN = """
import os
import sys
import keras
import numpy as np
from keras import layers


def data():
    random = np.random.default_rng(0)
    centres = 3 * random.standard_normal((3, 4))
    y = np.arange(90) % 3
    x = 1 + centres[y] + random.standard_normal((90, 4))
    return x[:60], y[:60], x[60:], y[60:]


def shifted():
    x_train, y_train, x_test, y_test = data()
    return x_train + 30, y_train, x_test + 30, y_test


def net(norm):
    return keras.Sequential([layers.Dense(8, activation="tanh"), norm(8), layers.Dense(3)])


def threads():
    if keras.config.backend() == "torch":
        import torch

        return torch.get_num_threads()
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return tf.config.threading.get_intra_op_parallelism_threads()
    layers.Dense(1)(np.ones((1, 1)))  # so that JAX has its pool
    if not os.path.isdir("/proc/self/task"):
        return 1
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum("XLAEigen" in name for name in names)


def four_layers(norm):
    if keras.config.backend() != "torch" and "torch" in sys.modules:
        raise RuntimeError("torch was imported on another backend")
    if threads() != 1:
        raise RuntimeError(f"{threads()} threads")
    hidden = layers.Dense(6), norm(6, activation="relu"), layers.Dense(6), layers.Dense(6)
    return keras.Sequential([*hidden, layers.Dense(3)])


class Inner(layers.Layer):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm = layers.Dense(5, use_bias=False), norm(5)

    def call(self, x, training=None):
        return self.norm(self.first(x), training=training)


class Subclassed(keras.Model):
    def __init__(self, norm):
        super().__init__()
        self.inner, self.last = Inner(norm), layers.Dense(3)

    def call(self, x, training=None):
        return self.last(self.inner(x, training=training))


def subclassed(norm):
    return Subclassed(norm)


def stands_still(norm):
    norm = layers.BatchNormalization(momentum=1.0)
    return keras.Sequential([layers.Dense(30), norm, layers.ReLU(), layers.Dense(3)])


def raises(norm):
    class Odd(layers.Layer):
        def call(self, x):
            raise RuntimeError("no such layer here")

    return keras.Sequential([Odd(), layers.Dense(3)])


def five_outputs(norm):
    return keras.Sequential([layers.Dense(5)])


def no_model(norm):
    return 3
"""


def write_own_code(folder: Path) -> Path:
    """Write `own.py` with `data` (3 classes, 4 features, 60 + 30 examples) and networks for it."""
    path = folder / "own.py"
    path.write_text(_OWN)
    return path
