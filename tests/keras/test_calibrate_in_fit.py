"""`calibrate` and the callback `Calibrate` around `fit`: row 1, validation, and training that goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from batchnorm.errors import OptionError
from batchnorm.keras import BatchNormalization
from batchnorm.keras.calibrate import Calibrate, calibrate

from .calibrated import Array, assert_same_state, assert_statistics, numbers, state, value

X = numbers(48, 3, offset=2.0)
Y = (X[:, :1] * 0.3 - 1).astype("float32")
VALIDATION = numbers(16, 3, offset=1.0), np.ones((16, 1), "float32")
FIT: dict[str, Any] = {"batch_size": 16, "shuffle": False, "verbose": 0}


@pytest.fixture(scope="module")
def built() -> tuple[keras.Sequential, list[Array]]:
    """A model and its first weights: compiling `fit` takes longer than all that is tested here."""
    keras.utils.set_random_seed(3)
    norms = BatchNormalization(), layers.BatchNormalization()
    model = keras.Sequential(
        [keras.Input((3,)), norms[0], layers.Dense(4, "tanh"), norms[1], layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    model.optimizer.build(model.trainable_variables)
    return model, _everything(model)


@pytest.fixture
def model(built: tuple[keras.Sequential, list[Array]]) -> keras.Sequential:
    _put(*built)
    return built[0]


def _everything(model: keras.Model) -> list[Array]:
    return [value(variable) for variable in (*model.variables, *model.optimizer.variables)]


def _put(model: keras.Model, values: list[Array]) -> None:
    for variable, old in zip((*model.variables, *model.optimizer.variables), values, strict=True):
        variable.assign(old)


def _assert_same(model: keras.Model, other: Callable[[], None]) -> None:
    """`other`, on the model as it was at first, comes to the same weights, statistics and optimizer."""
    found = _everything(model)
    other()
    for a, b in zip(found, _everything(model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _infer(model: keras.Model, x: Array, training: bool = False) -> Array:
    return np.asarray(ops.convert_to_numpy(model(x, training=training)))


def test_row_1_good_training_and_bad_evaluation_is_mended(model: keras.Sequential) -> None:
    """Pain row 1: after a few steps at momentum 0.99 inference is far off; calibrated, it is training's."""
    model.fit(X, Y, epochs=20, **FIT)
    lagging = _infer(model, X)
    calibrate(model, X, batch_size=48, verbose=0)
    calibrated = _infer(model, X)
    np.testing.assert_allclose(calibrated, _infer(model, X, training=True), atol=1e-5)
    assert ((lagging - Y) ** 2).mean() > 4 * ((calibrated - Y) ** 2).mean()


def test_only_the_moving_statistics_change(model: keras.Sequential) -> None:
    model.fit(X, Y, validation_data=VALIDATION, **FIT)
    before = state(model)
    calibrate(model, X, verbose=0)
    found = state(model)
    changed = [name for name in before["values"] if "moving" in name]
    assert len(changed) == 4
    for name in changed:
        assert not np.array_equal(found["values"].pop(name), before["values"].pop(name)), name
    assert_same_state(found, before)


class _ByHand(keras.callbacks.Callback):
    """Computes the validation loss by itself, after the validation."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        self.losses.append(float(((_infer(self.model, VALIDATION[0]) - VALIDATION[1]) ** 2).mean()))
        assert_statistics(self.model.layers[0], X)


def test_validation_sees_calibrated_statistics_and_training_goes_on(
    model: keras.Sequential, built: Any
) -> None:
    """The same as epochs of `fit`, each followed by `calibrate` and `evaluate`, to the last weight."""
    callback, by_hand = Calibrate((X, Y), batch_size=16, when="validation"), _ByHand()
    seen = model.fit(X, Y, epochs=3, validation_data=VALIDATION, callbacks=[callback, by_hand], **FIT).history
    expected: list[float] = []

    def one_by_one() -> None:
        _put(*built)
        for _ in range(3):
            model.fit(X, Y, **FIT)
            calibrate(model, X, batch_size=16, verbose=0)
            expected.append(model.evaluate(*VALIDATION, verbose=0))

    _assert_same(model, one_by_one)
    np.testing.assert_allclose(seen["val_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(seen["val_loss"], by_hand.losses, rtol=1e-5)
    assert callback.report is not None
    assert callback.report.samples == 48


def test_fit_ends_calibrated_and_trains_as_without(model: keras.Sequential, built: Any) -> None:
    callback = Calibrate(X, batch_size=16)
    assert callback.report is None
    seen = model.fit(X, Y, epochs=2, validation_data=VALIDATION, callbacks=[callback], **FIT).history
    assert_statistics(model.layers[0], X)

    def without() -> None:
        _put(*built)
        expected = model.fit(X, Y, epochs=2, validation_data=VALIDATION, **FIT).history
        for name in ("loss", "val_loss"):
            np.testing.assert_allclose(seen[name], expected[name], rtol=1e-5)
        calibrate(model, X, batch_size=16, verbose=0)

    _assert_same(model, without)


def test_after_early_stopping_the_restored_weights_are_calibrated(model: keras.Sequential) -> None:
    best: list[list[Array]] = []
    stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=1, restore_best_weights=True)
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_, **__: best.append(model.get_weights()))
    model.fit(X, Y, epochs=4, callbacks=[stop, keep, Calibrate(X, batch_size=16)], **FIT)
    found = model.get_weights()
    assert_statistics(model.layers[0], X)
    model.set_weights(best[0])
    calibrate(model, X, batch_size=16, verbose=0)
    for a, b in zip(found, model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_calibrate_in_the_middle_of_an_epoch(model: keras.Sequential, built: Any) -> None:
    """On JAX the weights are not in the variables there: they are fetched, and taken up again."""

    def halfway(batch: int, logs: Any) -> None:
        del logs
        if batch == 1:
            calibrate(model, X, batch_size=16, verbose=0)

    model.fit(X, Y, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=halfway)], **FIT)

    def in_two() -> None:
        _put(*built)
        model.fit(X[:32], Y[:32], **FIT)
        calibrate(model, X, batch_size=16, verbose=0)
        model.fit(X[32:], Y[32:], **FIT)

    _assert_same(model, in_two)


def test_an_interrupted_calibration_in_fit_leaves_what_was_trained(
    model: keras.Sequential, built: Any
) -> None:
    def exploding() -> Any:
        yield X
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, callbacks=[Calibrate(exploding())], **FIT)

    def without() -> None:
        _put(*built)
        model.fit(X, Y, **FIT)

    _assert_same(model, without)


def test_evaluate_takes_it_too(model: keras.Sequential) -> None:
    model.evaluate(*VALIDATION, verbose=0, callbacks=[Calibrate(X, batch_size=16)])
    assert np.array_equal(value(model.layers[0].moving_mean), np.zeros(3))
    model.evaluate(*VALIDATION, verbose=0, callbacks=[Calibrate(X, batch_size=16, when="validation")])
    assert_statistics(model.layers[0], X)


def test_one_pass_of_an_iterator_serves_the_end(model: keras.Sequential) -> None:
    model.fit(X, Y, epochs=2, callbacks=[Calibrate(iter([X[:24], X[24:]]))], **FIT)
    assert_statistics(model.layers[0], X)
    with pytest.raises(OptionError, match="used up by one calibration"):
        Calibrate(iter([X]), when="validation")


def test_what_cannot_be_calibrated_is_refused_before_training() -> None:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    before = state(model)["values"]
    with pytest.raises(OptionError, match="has no batch normalization"):
        model.fit(X, Y, callbacks=[Calibrate(X)], **FIT)
    np.testing.assert_equal(state(model)["values"], before)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(OptionError, match='when is "end" or "validation"; got \'epoch\''):
        Calibrate(X, when="epoch")
    with pytest.raises(OptionError, match="batch_size"):
        Calibrate(X, batch_size=-1)


class Spared(keras.layers.Dense):
    """Holds a normalization that it never calls."""

    def __init__(self) -> None:
        super().__init__(1)
        self.spare = BatchNormalization(name="spare")


def test_layers_that_no_sample_reached_are_named() -> None:
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(), Spared()])
    model.compile("sgd", "mse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.evaluate(X, Y, callbacks=[Calibrate(X, when="validation")], verbose=0)
    assert sum("no sample reached" in str(warning.message) for warning in caught) == 1
