"""`training=False` in functional models, which Keras overrides inside `fit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from batchnorm.keras import BatchNormalization, freeze

from .foldable import draw

X, Y = draw((32, 4)) * 3 + 5, draw((32, 1))


def direct(norm: Any) -> Any:
    """A functional model with one call of the norm, told not to be in training."""
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(1)(norm(layers.Dense(4)(x), training=False)))


def guide(norm: Any) -> Any:
    """Keras's guide to fine-tuning: a base model, called so within another one."""
    x, inner = keras.Input((4,)), keras.Input((4,))
    base = keras.Model(inner, norm(layers.Dense(4)(inner)), name="base")
    return keras.Model(x, layers.Dense(1)(base(x, training=False)))


class Subclassed(keras.Model):
    """The same, whose `call` is the user's own: that Keras does heed."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        inner = keras.Input((4,))
        self.base = keras.Model(inner, norm(layers.Dense(4)(inner)))
        self.head = layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.head(self.base(x, training=False))


def moves(norm: Any, model: Any) -> bool:
    """Whether `fit` moves the statistics of `norm`."""
    model.compile("sgd", "mse")
    model.fit(X, Y, epochs=1, verbose=0)
    return bool(np.any(keras.ops.convert_to_numpy(norm.moving_mean)))


@pytest.mark.parametrize("build", [direct, Subclassed])
def test_row_75_a_layer_heeds_what_it_was_told(build: Callable[[Any], Any]) -> None:
    """Row 75: `layer(x, training=False)` holds inside `fit`, where the stock layer moves."""
    norm = BatchNormalization()
    assert not moves(norm, build(norm))


def test_row_75_the_guide_needs_freeze() -> None:
    """Row 75: what a base model was told never reaches its layers."""
    for kind in (layers.BatchNormalization, BatchNormalization):
        norm = kind()
        assert moves(norm, guide(norm))
        norm = kind()
        assert not moves(norm, freeze(guide(norm)))


def test_a_copy_by_its_config_heeds_it_too() -> None:
    model = keras.Model.from_config(direct(BatchNormalization()).get_config(), {"Model": keras.Model})
    (norm,) = (layer for layer in model.layers if isinstance(layer, BatchNormalization))
    assert not moves(norm, model)


def test_one_of_several_calls_does_not_decide() -> None:
    norm, x = BatchNormalization(), keras.Input((4,))
    both = keras.Model(x, layers.Dense(1)(norm(x, training=False) + norm(x)))
    assert moves(norm, both)


def test_a_told_layer_normalizes_by_its_moving_statistics_in_fit() -> None:
    norm = BatchNormalization()
    model = direct(norm)
    before = model.predict(X, verbose=0)
    norm.moving_mean.assign(keras.ops.ones(4))
    seen = keras.ops.convert_to_numpy(model(X, training=True))
    assert not np.allclose(seen, before)
    np.testing.assert_allclose(seen, model.predict(X, verbose=0), rtol=1e-5, atol=1e-5)
