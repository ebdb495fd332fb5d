"""`batchnorm.keras.calibrate` takes what Keras trains on, and refuses what it would misread."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from batchnorm.errors import DataError
from batchnorm.keras import BatchNormalization
from batchnorm.keras.calibrate import Calibration, calibrate

from .calibrated import Array, assert_statistics, numbers

X = numbers(30, 3)
PARTS = [X[:12], X[12:24], X[24:]]
Y = np.zeros(30)


class DataSet(keras.utils.PyDataset):
    """Batches of 12, of which there are `number`; None = without an end."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.number = number

    @property
    def num_batches(self) -> int | None:
        return self.number

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        return PARTS[index % 3], np.zeros(12)


def _model() -> keras.Sequential:
    return keras.Sequential([keras.Input((3,)), BatchNormalization()])


def _loader(*tensors: Any) -> Any:
    from torch import from_numpy
    from torch.utils.data import DataLoader, TensorDataset

    return DataLoader(TensorDataset(*map(from_numpy, tensors)), batch_size=12)


FORMS = {
    "array": lambda: X,
    "tensor": lambda: ops.convert_to_tensor(X),
    "x and y": lambda: (X, Y),
    "x, y and weights": lambda: (X, Y, Y),
    "list of pairs": lambda: [(part, part) for part in PARTS],
    "list of lists": lambda: [[part, part, part] for part in PARTS],
    "iterator": lambda: iter(PARTS),
    "iterator of tensors": lambda: iter(map(ops.convert_to_tensor, PARTS)),
    "PyDataset": lambda: DataSet(3),
    "loader": lambda: _loader(X),
    "loader of pairs": lambda: _loader(X, Y),
    "wide": lambda: X.astype("float64"),
}


def test_every_form() -> None:
    model, calibration = _model(), Calibration(12, None, 0)
    for name, form in FORMS.items():
        model.layers[0].moving_mean.assign(np.zeros(3))
        report = calibration.run(model, form())
        assert (report.samples, report.batches) == (30, 3), name
        assert_statistics(model.layers[0], X)


def test_several_inputs_by_place_and_by_name() -> None:
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    norms = BatchNormalization(), BatchNormalization()
    model = keras.Model([a, b], [norm(x) for norm, x in zip(norms, (a, b), strict=True)])
    second = numbers(30, 2)
    calibration = Calibration(12, None, 0)
    for data in ([X, second], {"a": X, "b": second}, ({"a": X, "b": second}, Y), iter([([X, second], Y)])):
        norms[1].moving_mean.assign(np.zeros(2))
        assert calibration.run(model, data).samples == 30
        assert_statistics(norms[0], X)
        assert_statistics(norms[1], second)


def test_tf_data(backend: str) -> None:
    if backend != "tensorflow":
        pytest.skip("TensorFlow's own data sets are tried on its own backend")
    import tensorflow as tf

    pairs = tf.data.Dataset.from_tensor_slices((X, Y)).batch(12)
    for data in (pairs, pairs.map(lambda x, _: x), pairs.filter(lambda *_: True), pairs.take(3).repeat(1)):
        model = _model()
        assert calibrate(model, data, verbose=0).batches == 3
        assert_statistics(model.layers[0], X)
    with pytest.raises(DataError, match="has no end: pass steps"):
        calibrate(_model(), pairs.repeat(), verbose=0)
    assert calibrate(_model(), pairs.repeat(), steps=7, verbose=0).batches == 7


@pytest.mark.parametrize("form", ["array", "iterator", "PyDataset"])
def test_steps_bound_the_batches(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = _model()
    report = calibrate(model, FORMS[form](), batch_size=12, steps=2, verbose=2)
    assert (report.samples, report.batches) == (24, 2)
    assert_statistics(model.layers[0], X[:24])
    assert "2/2" in capsys.readouterr().out


def test_an_iterator_is_taken_no_further_than_steps() -> None:
    batches = iter(PARTS)
    calibrate(_model(), batches, steps=2, verbose=0)
    assert next(batches) is PARTS[2]


def test_data_without_an_end_needs_steps() -> None:
    with pytest.raises(DataError, match="DataSet has no end: pass steps"):
        calibrate(_model(), DataSet(None), verbose=0)
    assert calibrate(_model(), DataSet(None), steps=4, verbose=0).samples == 42


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        (iter([]), "no batch"),
        (X[:0], "no batch"),
        (None, "got a NoneType"),
        ("file", "got a str"),
        ({"a": "file"}, "got a dict"),
        (iter([object()]), "a batch holds arrays or tensors.*object"),
        (iter([3.0]), r"a batch holds arrays or tensors.*3\.0"),
        (iter([(X, Y, Y, Y)]), "a batch is x, .*; got a tuple of 4"),
        (iter([(None, Y)]), "without x"),
        ((X, Y, Y, Y), "a batch is x, .*; got a tuple of 4"),
        (PARTS, r"a list of 3 arrays for a model of 1 inputs.*iter\(batches\)"),
        (np.float32(3), "got a float32"),
    ],
)
def test_data_of_another_form_is_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        calibrate(_model(), data, verbose=0)


def test_arrays_of_unequal_length_are_refused() -> None:
    inputs = [keras.Input((3,)), keras.Input((3,))]
    model = keras.Model(inputs, BatchNormalization()(inputs[0] + inputs[1]))
    with pytest.raises(DataError, match="differ in length: 12, 30"):
        calibrate(model, [X, X[:12]], verbose=0)


def test_progress_knows_how_many_batches_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = []
    bar = keras.utils.Progbar

    def seen(target: int | None, **options: Any) -> Any:
        targets.append(target)
        return bar(target, **options)

    monkeypatch.setattr(keras.utils, "Progbar", seen)
    model, calibration = _model(), Calibration(12, None, 0)
    for form in ("array", "list of pairs", "PyDataset", "loader", "iterator"):
        calibration.run(model, FORMS[form]())
    assert targets == [math.ceil(30 / 12), 3, 3, 3, None]
