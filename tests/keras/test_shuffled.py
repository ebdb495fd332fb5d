"""Row 42: `Ghost(size, shuffle=True)` in Keras: ghost batches drawn by Keras's generator, on any backend."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import batchnorm
from batchnorm.errors import OptionError
from batchnorm.keras import BatchNormalization

from .calibrated import numbers

SHUFFLED = batchnorm.Ghost(4, shuffle=True)


def _order(layer: BatchNormalization, samples: int) -> np.ndarray:
    """Return the order that the layer's next call draws."""
    generator = keras.random.SeedGenerator(0)
    generator.state.assign(layer._shuffler.state)
    return ops.convert_to_numpy(keras.random.shuffle(ops.arange(samples), seed=generator))


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("mask", ["none", "values", "broadcast"])
def test_shuffled_ghost_batches_are_those_of_a_permuted_batch(axis: int, mask: str) -> None:
    x = numbers(11 * 5, 3, offset=1.0).reshape((11, 5, 3) if axis == -1 else (11, 3, 5))
    layer, twin = (BatchNormalization(axis=axis, statistics=s) for s in (SHUFFLED, batchnorm.Ghost(4)))
    layer.build(x.shape)
    twin.build(x.shape)
    valid = np.random.default_rng(0).random((11, 5)) < 0.7 if mask == "values" else np.ones((1, 5), bool)
    order = _order(layer, 11)
    masks = (None, None) if mask == "none" else (valid, valid[order] if mask == "values" else valid)
    y = ops.convert_to_numpy(layer(x, training=True, mask=masks[0]))
    expected = ops.convert_to_numpy(twin(x[order], training=True, mask=masks[1]))
    np.testing.assert_allclose(y[order], expected, rtol=1e-5, atol=1e-5)
    for own, other in zip(layer.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)
    assert list(order) != list(range(11))
    assert list(_order(layer, 11)) != list(order)  # each call draws anew
    np.testing.assert_array_equal(*(ops.convert_to_numpy(layer(x, training=False)) for _ in range(2)))


def test_it_trains_in_fit_and_is_saved(tmp_path: Path) -> None:
    model = keras.Sequential(
        [keras.Input((3,)), BatchNormalization(statistics=SHUFFLED), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    x = numbers(32, 3, offset=2.0)
    model.fit(x, x[:, :1], batch_size=16, epochs=2, verbose=0)
    assert (ops.convert_to_numpy(model.layers[0].moving_mean) != 0).all()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].statistics == SHUFFLED
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6)


def test_a_built_layer_cannot_get_a_generator() -> None:
    layer = BatchNormalization()
    layer.statistics = SHUFFLED
    layer.statistics = batchnorm.Batch()
    layer.build((None, 3))
    layer.statistics = SHUFFLED  # it has one from before
    other = BatchNormalization()
    other.build((None, 3))
    with pytest.raises(OptionError, match=r"batch_normalization.*needs a generator of random numbers"):
        other.statistics = SHUFFLED
    assert other.statistics == batchnorm.Batch()
