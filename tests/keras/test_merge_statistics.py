"""`batchnorm.keras.merge_statistics`: exact against pooled data, from weights and files, and atomic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import batchnorm
from batchnorm.errors import ArgumentTypeError, DataError, OptionError

from .calibrated import numbers

SIZES = (50, 13, 1)


def _model(renorm: bool = False) -> keras.Model:
    inputs = keras.Input((4, 3))
    first = batchnorm.keras.BatchNormalization(renorm=renorm)(inputs)
    return keras.Model(inputs, keras.layers.BatchNormalization(axis=1)(first))


def _clients(model: keras.Model) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the data of clients, their weights, and what calibrated these."""
    x = np.concatenate([numbers(12 * size, 1, offset=3.0 * size).reshape(size, 4, 3) for size in SIZES])
    parts = np.split(x, np.cumsum(SIZES)[:-1])
    states, reports, before = [], [], model.get_weights()
    for part in parts:
        reports.append(batchnorm.keras.calibrate(model, part, batch_size=64, verbose=0))
        states.append(model.get_weights())
        model.set_weights(before)
    return parts, states, reports


@pytest.mark.parametrize("renorm", [False, True])
def test_uneven_clients_merge_into_the_statistics_of_their_pooled_data(renorm: bool, tmp_path: Path) -> None:
    """Pain row 40."""
    model = _model(renorm)
    parts, states, reports = _clients(model)
    batchnorm.keras.calibrate(model, iter(parts), verbose=0)
    wanted = model.get_weights()
    file = tmp_path / "client.weights.h5"
    model.set_weights(states[0])
    model.save_weights(file)
    for given in (states, [file, *states[1:]]):
        model.set_weights(states[2])
        assert batchnorm.keras.merge_statistics(model, given, reports) is model
        for found, value in zip(model.get_weights(), wanted, strict=True):
            np.testing.assert_allclose(found, value, rtol=2e-6, atol=2e-6)
    x = np.concatenate(parts).astype("float64")
    np.testing.assert_allclose(model.layers[1].moving_mean, x.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(model.layers[1].moving_variance, x.var((0, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("states", "counts", "error", "says"),
    [
        (lambda m: [m.get_weights()] * 2, [5], OptionError, "one entry per state: got 1 for 2"),
        (lambda m: [m], [5], ArgumentTypeError, "states[0] is a model: pass its get_weights()"),
        (lambda m: m, [5], ArgumentTypeError, "states must be a list of weights"),
        (lambda m: [m.get_weights()[1:]], [5], DataError, "states[0] has 7 arrays"),
        (lambda m: [[w * np.nan for w in m.get_weights()]], [5], DataError, "states[0], "),
        (lambda m: [m.get_weights()], [0], DataError, "0 values per channel in all states"),
        (lambda m: [m.get_weights()], [-2], OptionError, "got -2 for states[0]"),
        (lambda m: [m.get_weights()], [{"x": 3}], OptionError, "the counts of states[0] lack"),
        (lambda _: ["none.weights.h5"], [3], DataError, "does not load"),
    ],
)
def test_wrong_states_and_counts_change_nothing(
    states: Any, counts: Any, error: type[Exception], says: str
) -> None:
    model = _model()
    before = model.get_weights()
    with pytest.raises(error) as caught:
        batchnorm.keras.merge_statistics(model, states(model), counts)
    assert says in str(caught.value)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_model_without_norms_or_weights_is_refused() -> None:
    with pytest.raises(DataError, match="no batch normalization"):
        batchnorm.keras.merge_statistics(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]), [], [])
    for model in (keras.Sequential([batchnorm.keras.BatchNormalization()]), 5):
        with pytest.raises(OptionError, match="takes a built Keras model"):
            batchnorm.keras.merge_statistics(model, [], [])
