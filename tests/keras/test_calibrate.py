"""`batchnorm.keras.calibrate`: exact over any split, atomic, and candid about what it cannot know."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from torch.nn import BatchNorm1d

from batchnorm.errors import DataError, InputShapeError, OptionError
from batchnorm.keras import BatchNormalization
from batchnorm.keras.calibrate import Calibration, calibrate

from .calibrated import (
    assert_same_state,
    assert_statistics,
    network,
    normalized,
    numbers,
    state,
    value,
    wide,
)

NORMS = [BatchNormalization, layers.BatchNormalization]


def _single(norm: keras.layers.Layer, *shape: int | None) -> keras.Sequential:
    return keras.Sequential([keras.Input(shape), norm])


def test_any_split_gives_the_statistics_of_all_values() -> None:
    """Pain row 1 (whole-dataset statistics): NumPy's over the whole set, whatever the batches."""
    x = np.concatenate([numbers(66, 3), numbers(66, 2, offset=1e5)], axis=1)
    inputs, ours, stock = keras.Input((5,)), BatchNormalization(), layers.BatchNormalization()
    model = keras.Model(inputs, [ours(inputs), stock(inputs)])
    calibration = Calibration(1, None, 0)
    for size in (2, 7, 64, 66):
        calibration.batch_size = size
        report = calibration.run(model, x)
        assert_statistics(ours, x)
        assert_statistics(stock, x)
        assert (report.samples, report.batches) == (66, -(-66 // size))
        assert report.layers[0].values == 66


def test_batches_of_one_sample_give_the_statistics_of_all_values() -> None:
    x = numbers(9, 3)
    model = _single(layers.BatchNormalization(), 3)
    report = calibrate(model, x, batch_size=1, verbose=0)
    assert_statistics(model.layers[0], x)
    assert report.layers[0].exact


def test_deeper_layers_receive_what_the_batch_statistics_normalize() -> None:
    x = numbers(40, 5)
    model = network()
    first, dense, dropout, last, second = model.layers
    report = calibrate(model, x, batch_size=10, verbose=0)

    def received(batch: Any) -> Any:
        hidden = np.maximum(normalized(first, batch) @ wide(dense.kernel) + wide(dense.bias), 0)
        return hidden @ wide(last.kernel) + wide(last.bias)

    assert dropout.rate == 0.5
    assert_statistics(first, x)
    assert_statistics(second, np.concatenate([received(x[i : i + 10]) for i in range(0, 40, 10)]))
    assert [(layer.name, layer.exact) for layer in report.layers] == [("first", True), ("second", False)]
    assert "second *" in str(report)


def test_an_activation_is_applied_on_the_way_to_deeper_layers() -> None:
    x = numbers(40, 5)
    model = keras.Sequential([keras.Input((5,)), BatchNormalization(activation="relu"), BatchNormalization()])
    calibrate(model, x, batch_size=40, verbose=0)
    assert_statistics(model.layers[1], np.maximum(normalized(model.layers[0], x), 0))


@pytest.mark.parametrize("shape", [(30, 3, 4), (30, 3, 4, 2)])
def test_channels_first(shape: tuple[int, ...]) -> None:
    x = numbers(*shape, axis=1)
    model = _single(BatchNormalization(axis=1), *shape[1:])
    assert calibrate(model, x, batch_size=10, verbose=0).layers[0].values == x.size // 3
    assert_statistics(model.layers[0], x, axis=1)


def test_mixed_float16() -> None:
    x = numbers(60, 3)
    model = _single(BatchNormalization(dtype="mixed_float16"), 3)
    calibrate(model, x, batch_size=30, verbose=0)
    assert_statistics(model.layers[0], x.astype("float16").astype("float64"))


def test_a_layer_used_twice_pools_what_it_received() -> None:
    x = numbers(60, 3)
    inputs, shared = keras.Input((3,)), BatchNormalization()
    model = keras.Model(inputs, shared(inputs) + shared(2 * inputs + 1))
    report = calibrate(model, x, batch_size=20, verbose=0)
    assert_statistics(shared, np.concatenate([x, 2 * x + 1]))
    assert report.layers[0].values == 120


class Block(keras.layers.Layer):
    """A user's own layer, with a mask of its own."""

    def __init__(self, steps: int | None = None) -> None:
        super().__init__(name="block")
        self.norm = layers.BatchNormalization(name="norm")
        self.steps = steps

    def call(self, x: Any) -> Any:
        return self.norm(x, mask=x[:, : self.steps, 0] > 0)


class Own(keras.Model):
    """A subclassed model that nothing has built."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        inner = keras.Input((4, 2))
        self.inner = keras.Model(inner, BatchNormalization(name="deep")(inner), name="inner")
        self.timed = layers.TimeDistributed(BatchNormalization(name="step"), name="timed")

    def call(self, x: Any) -> Any:
        return self.block(x), self.inner(x), self.timed(x)


def test_any_nesting_in_a_model_that_was_never_built() -> None:
    x = numbers(30, 4, 2)
    model = Own()
    report = calibrate(model, x, batch_size=15, verbose=0)
    assert_statistics(model.block.norm, x[x[:, :, 0] > 0])
    assert_statistics(model.inner.layers[1], x)
    assert_statistics(model.timed.layer, x)
    assert [layer.name for layer in report.layers] == ["block/norm", "inner/deep", "timed/step"]
    assert [layer.values for layer in report.layers] == [(x[:, :, 0] > 0).sum(), 120, 120]


@pytest.mark.parametrize("norm", NORMS)
def test_masks_of_other_layers_do_not_count(norm: Any) -> None:
    x = numbers(30, 6, 2)
    lengths = np.arange(30) % 6  # some samples have no step at all, and the first batch little
    counts = np.arange(6) < lengths[:, None]
    x[~counts] = -9.0
    model = keras.Sequential([keras.Input((6, 2)), layers.Masking(-9.0), norm(name="norm")])
    report = calibrate(model, x, batch_size=5, verbose=0)
    assert_statistics(model.layers[-1], x[counts])
    assert report.layers[0].values == counts.sum()


def test_a_channel_that_got_no_value_keeps_its_statistics() -> None:
    x = numbers(10, 3, 2, axis=1)
    inputs = [keras.Input((3, 2)), keras.Input((3,), dtype="bool")]
    norm = BatchNormalization(axis=1, moving_mean_initializer="random_normal")
    model = keras.Model(inputs, norm(inputs[0], mask=inputs[1]))
    before = value(norm.moving_mean)
    counts = np.ones((10, 3), bool)
    counts[:, 1] = False
    calibrate(model, [x, counts], batch_size=5, verbose=0)
    mean = np.where([True, False, True], x.mean((0, 2)), before)
    np.testing.assert_allclose(value(norm.moving_mean), mean, rtol=1e-5)
    assert value(norm.moving_variance)[1] == 1.0


def test_frozen_layers_use_and_keep_their_statistics() -> None:
    x = numbers(40, 5)
    model = network()
    model.layers[0].trainable = False
    kept = value(model.layers[0].moving_variance)
    report = calibrate(model, x, batch_size=8, verbose=0)
    assert np.array_equal(value(model.layers[0].moving_variance), kept)
    assert report.frozen == ("first",)
    assert "Frozen, left as before: first." in str(report)
    assert report.layers[0].exact  # a frozen layer before it normalizes every batch alike
    received = keras.Model(model.inputs, model.layers[3].output).predict(x, verbose=0)
    assert_statistics(model.layers[4], received)


@pytest.mark.parametrize("norm", NORMS)
def test_renorm_gets_its_standard_deviation_and_keeps_what_training_corrects_by(norm: Any) -> None:
    x = numbers(40, 3)
    model = _single(norm(renorm=True), 3)
    layer = model.layers[0]
    calibrate(model, x, batch_size=8, verbose=0)
    assert_statistics(layer, x)
    expected = np.sqrt(x.var(0, dtype=np.float64) + layer.epsilon)
    np.testing.assert_allclose(value(layer.moving_stddev), expected, rtol=1e-5)
    assert np.array_equal(value(layer.renorm_mean), np.zeros(3))
    assert np.array_equal(value(layer.renorm_stddev), np.ones(3))


def test_the_report_says_how_far_the_statistics_moved() -> None:
    x = numbers(500, 2, offset=6.0)
    model = _single(BatchNormalization(epsilon=1e-12), 2)
    report = calibrate(model, x, batch_size=500, verbose=0)
    (change,) = report.layers
    std = x.std(0, dtype=np.float64)
    assert change.mean_shift == pytest.approx((x.mean(0, dtype=np.float64) / std).max())
    assert change.std_ratio == pytest.approx(std[1])
    assert "500 samples in 1 batches" in str(report)
    assert "Frozen" not in str(report)


def _exploding(error: BaseException) -> Iterator[Any]:
    yield from [numbers(8, 5)] * 2
    raise error


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_in_the_data_leaves_the_model_as_it_was(error: BaseException) -> None:
    model = network()
    before = state(model)
    with pytest.raises(type(error)):
        calibrate(model, _exploding(error), verbose=0)
    assert_same_state(state(model), before)


class Failing(keras.layers.Layer):
    """Fails on demand, while the layers before it are measured, and moves a counter each time."""

    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        self.calls.assign_add(1.0)
        if Failing.fails:
            raise KeyboardInterrupt
        return x


def _failing_at_the_second(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield numbers(8, 5)
    monkeypatch.setattr(Failing, "fails", True)
    yield numbers(3, 5)  # of another length: compiled anew


@pytest.mark.parametrize("eager", [False, True])
def test_an_interruption_in_the_model_leaves_it_as_it_was(
    eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = keras.Sequential([keras.Input((5,)), BatchNormalization(), Failing(), BatchNormalization()])
    model.compile("sgd", "mse", run_eagerly=eager)
    if hasattr(model, "modules"):
        model.train()
        model.layers[0].eval()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, _failing_at_the_second(monkeypatch), verbose=0)
    monkeypatch.undo()
    assert_same_state(state(model), before)
    calibrate(model, numbers(8, 5), verbose=0)
    assert value(model.layers[1].calls) == 0


class Deciding(keras.Model):
    """Looks at its numbers, which a compiled call does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNormalization()

    def call(self, x: Any) -> Any:
        return self.norm(x) if float(x[0, 0]) < 1e9 else x


def test_a_model_that_cannot_be_compiled() -> None:
    model, x = Deciding(), numbers(30, 3)
    model.compile(run_eagerly=True)
    calibrate(model, x, batch_size=15, verbose=0)
    assert_statistics(model.norm, x)


@pytest.mark.parametrize("at", range(5))
def test_an_interruption_of_a_write_leaves_the_model_as_it_was(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = keras.Sequential([keras.Input((5,)), BatchNormalization(renorm=True), BatchNormalization()])
    before = state(model)
    assign, written = keras.Variable.assign, []

    def interrupted(self: Any, new: Any) -> Any:
        if not keras.src.backend.in_stateless_scope():
            written.append(self.path)
            if len(written) == at + 1:
                raise KeyboardInterrupt
        return assign(self, new)

    monkeypatch.setattr(keras.Variable, "assign", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, numbers(8, 5), verbose=0)
    monkeypatch.undo()
    assert_same_state(state(model), before)


def test_nan_and_inf_are_refused_by_the_layer_that_received_them() -> None:
    model, calibration = network(), Calibration(32, None, 0)
    before = state(model)
    for bad in (np.nan, np.inf, 3e38):
        x = numbers(64, 5)
        x[33:36, 2] = bad
        with pytest.raises(DataError, match=r"^first: received NaN or inf.*unchanged"):
            calibration.run(model, x)
        assert_same_state(state(model), before)


def test_statistics_that_the_variables_cannot_hold_are_refused() -> None:
    model = _single(layers.BatchNormalization(dtype="float16"), 3)  # ours has float32 ones
    with pytest.raises(DataError, match="too large for float16 statistics"):
        calibrate(model, 1000 * numbers(40, 3), verbose=0)


def test_a_layer_for_which_all_is_masked_is_refused() -> None:
    model = keras.Sequential([keras.Input((6, 2)), layers.Masking(-9.0), BatchNormalization(name="norm")])
    with pytest.raises(DataError, match="norm: received no valid value"):
        calibrate(model, np.full((8, 6, 2), -9.0), verbose=0)


def test_a_mask_that_does_not_fit_names_the_layer() -> None:
    model = keras.Sequential([Block(steps=3)])
    model.layers[0].norm.build((None, 4, 3))
    model.layers[0].built = True
    with pytest.raises(InputShapeError, match=r"block/norm \(BatchNormalization\): a mask of shape"):
        calibrate(model, numbers(8, 4, 3), verbose=0)


def test_single_values_have_no_variance() -> None:
    model, calibration = network(), Calibration(1, None, 0)
    before = state(model)
    with pytest.raises(DataError, match="first: received one value per channel in all"):
        calibration.run(model, numbers(1, 5))
    with pytest.raises(DataError, match="first: received one value per channel in every batch"):
        calibration.run(model, numbers(4, 5))
    assert_same_state(state(model), before)
    calibration.run(model, iter([numbers(4, 5), numbers(1, 5)]))  # a last batch of one is no reason


def test_layers_that_no_sample_reached_are_named_and_left() -> None:
    model = Own()
    model.spare = BatchNormalization(name="spare")
    model.spare.build((None, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = calibrate(model, numbers(8, 4, 2), verbose=0)
    (ours,) = (warning for warning in caught if "no sample reached spare" in str(warning.message))
    assert (ours.category, ours.filename) == (UserWarning, __file__)
    assert report.unreached == ("spare",)
    assert np.array_equal(value(model.spare.moving_variance), np.ones(3))


def test_models_without_a_norm_to_calibrate_are_refused() -> None:
    with pytest.raises(OptionError, match="Sequential has no batch normalization"):
        calibrate(_single(layers.Dense(2), 3), numbers(4, 3), verbose=0)
    model = network()
    model.trainable = False
    with pytest.raises(OptionError, match=r"is frozen.*first"):
        calibrate(model, numbers(4, 5), verbose=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size"), ({"steps": 1.5}, "steps"), ({"verbose": 3}, "verbose")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        calibrate(network(), numbers(4, 5), **options)


def test_a_size_may_be_numpys() -> None:
    assert calibrate(network(), numbers(4, 5), batch_size=np.int64(2), steps=np.int32(2)).batches == 2


@pytest.mark.parametrize("thing", [None, BatchNormalization, BatchNorm1d(5)], ids=["None", "class", "torch"])
def test_what_is_no_keras_model_is_refused(thing: Any) -> None:
    with pytest.raises(OptionError, match=r"takes a Keras model or layer; got a .*models of torch"):
        calibrate(thing, numbers(4, 5))


def test_progress_is_keras_own(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = _single(BatchNormalization(), 5), numbers(40, 5)
    shown = {}
    for verbose in ("auto", 2, 0):
        calibrate(model, iter([x] * 3), verbose=verbose)
        shown[verbose] = capsys.readouterr().out
    assert "3/3" in shown["auto"]
    assert "━" in shown["auto"]
    assert "3/3 - " in shown[2]
    assert "━" not in shown[2]
    assert shown[0] == ""


def test_the_compiled_forward_is_kept_while_it_serves() -> None:
    model, calibration = network(), Calibration(32, None, 0)
    calibration.run(model, numbers(32, 5))
    kept = calibration._forward
    calibration.run(model, numbers(64, 5))
    assert calibration._forward is kept
    assert_statistics(model.layers[0], numbers(64, 5))
    model.layers[0].trainable = False
    calibration.run(model, numbers(32, 5))
    assert calibration._forward is not kept
    assert_statistics(model.layers[0], numbers(64, 5))
