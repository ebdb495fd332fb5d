"""The callbacks `Monitor` and `Doctor` within `fit`: rows are exact, and training is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import batchnorm
from batchnorm.errors import ArgumentTypeError, OptionError
from batchnorm.keras import BatchNormalization, Doctor, Monitor

from .calibrated import numbers

X = numbers(48, 3, offset=2.0)
Y = (X[:, :1] * 0.3 - 1).astype("float32")
FIT: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0}
Rows = dict[int, dict[str, float]]


def _model(**options: Any) -> keras.Sequential:
    keras.utils.set_random_seed(3)
    ours = BatchNormalization(name="ours", momentum=0.8, nonfinite="skip")
    model = keras.Sequential(
        [keras.Input((3,)), ours, layers.Dense(4, "tanh"), layers.BatchNormalization(name="stock")]
    )
    model.add(layers.Dense(1))
    model.compile(keras.optimizers.SGD(1e-4), "mse", **options)
    return model


def _distances(x: Any, mean: Any, var: Any, eps: float = 1e-3) -> tuple[float, float]:
    """By NumPy in float64: of one batch, and of the moving statistics before it."""
    x = np.asarray(x, "float64")
    off = np.sqrt(np.mean((x.mean(0) - mean) ** 2 / (x.var(0) + eps)))
    logs = 0.5 * np.log((x.var(0) + eps) / (var + eps))
    return float(off), float(np.exp(np.sqrt(np.mean(logs**2))))


def _received_by_stock(model: keras.Sequential, x: Any) -> Any:
    """What the second norm receives in training, by NumPy."""
    x = np.asarray(x, "float64")
    y = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)
    kernel, bias = (np.asarray(w, "float64") for w in model.layers[1].get_weights())
    return np.tanh(y @ kernel + bias)


@pytest.mark.on_every_backend
def test_rows_are_exact_and_training_is_the_same() -> None:
    rows: Rows = {}
    model = _model()
    first = _received_by_stock(model, X[:8])
    model.layers[2].gamma.assign([1.0, 0.0, 2.0, 1e-9])
    monitor = Monitor(lambda row, step: rows.update({step: row}), every=4)
    model.fit(X, Y, epochs=2, callbacks=[monitor], **FIT)
    assert monitor.step == 12
    assert list(rows) == [0, 4, 8]
    mean, var = np.zeros(3), np.ones(3)
    for step in range(12):
        batch = X[8 * (step % 6) :][:8].astype("float64")
        if step in rows:
            found = rows[step]["bn/ours/mean_distance"], rows[step]["bn/ours/std_ratio"]
            np.testing.assert_allclose(found, _distances(batch, mean, var), rtol=2e-5)
            assert rows[step]["bn/ours/skipped"] == 0
        mean, var = 0.8 * mean + 0.2 * batch.mean(0), 0.8 * var + 0.2 * batch.var(0)
    found = rows[0]["bn/stock/mean_distance"], rows[0]["bn/stock/std_ratio"]
    np.testing.assert_allclose(found, _distances(first, np.zeros(4), np.ones(4)), rtol=1e-3)
    assert rows[0]["bn/stock/dead_channels"] == 0.5  # gamma is 0 or 1e-9
    assert "bn/stock/skipped" not in rows[0]
    plain = _model()
    plain.layers[2].gamma.assign([1.0, 0.0, 2.0, 1e-9])
    plain.fit(X, Y, epochs=2, **FIT)
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_did_not_move_has_no_distance() -> None:
    """A skipped batch, a frozen layer, and statistics that move in turn."""
    rows: Rows = {}
    x = X.copy()
    x[3, 1] = np.inf
    model = _model()
    model.fit(x, Y, epochs=1, callbacks=[Monitor(lambda row, step: rows.update({step: row}))], **FIT)
    assert {name for name in rows[0] if "/ours/" in name} == {"bn/ours/skipped", "bn/ours/dead_channels"}
    assert rows[0]["bn/ours/skipped"] == 1
    keras.utils.set_random_seed(3)
    ghost = BatchNormalization(name="ghost", statistics=batchnorm.Ghost(4, sequential=True), scale=False)
    frozen = BatchNormalization(name="frozen", scale=False)
    model = keras.Sequential([keras.Input((3,)), ghost, frozen, layers.Dense(1)])
    frozen.frozen = True
    model.compile("sgd", "mse")
    model.fit(X, Y, epochs=1, callbacks=[Monitor(lambda row, step: rows.update({step: row}))], **FIT)
    assert rows[0] == {}


@pytest.mark.on_every_backend
def test_several_batches_of_one_execution_count_as_one() -> None:
    """On torch Keras takes one batch per execution."""
    rows: Rows = {}
    k = 1 if keras.backend.backend() == "torch" else 3
    model = _model(steps_per_execution=k)
    monitor = Monitor(lambda row, step: rows.update({step: row}), every=3)
    model.fit(X, Y, epochs=1, callbacks=[monitor], **FIT)
    assert monitor.step == 6
    assert list(rows) == [0, 3]
    weights = np.array([0.2 * 0.8 ** (k - 1 - number) for number in range(k)]) / (1 - 0.8**k)
    parts = np.stack([X[8 * number :][:8].astype("float64") for number in range(k)])
    mean, var = (np.tensordot(weights, values, 1) for values in (parts.mean(1), parts.var(1)))
    off = np.sqrt(np.mean(mean**2 / (var + 1e-3)))
    assert rows[0]["bn/ours/mean_distance"] == pytest.approx(off, rel=1e-5)


def test_options_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="every is a number of steps"):
        Monitor(print, every=0)
    with pytest.raises(ArgumentTypeError, match="got 3"):
        Monitor(3)  # type: ignore[arg-type]
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(OptionError, match="Sequential has no batch normalization to monitor"):
        model.fit(X, Y, callbacks=[Monitor(tmp_path / "norms.csv")], **FIT)


@pytest.mark.on_every_backend
def test_the_doctor_tells_at_the_start_of_fit(capsys: pytest.CaptureFixture[str]) -> None:
    model, doctor = _model(), Doctor((X, Y), samples=16, batch_size=4, ignore=["bias-before"])
    model.fit(X, Y, callbacks=[doctor], **FIT)
    assert doctor.diagnosis is not None
    assert doctor.diagnosis.cost.samples == 16
    assert "never-updated" in {finding.check for finding in doctor.diagnosis.findings}
    assert doctor.diagnosis.title in capsys.readouterr().out
