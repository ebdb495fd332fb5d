"""A study in Keras of one's own data and losses: PyDataset, tf.data, inputs by name, numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchnorm.studies import objectives, training
from batchnorm.studies.arms import parse_arm
from batchnorm.studies.data import load_data, own_data
from batchnorm.studies.errors import StudyError
from batchnorm.studies.learner_keras import KerasLearner, make_learner, session
from batchnorm.studies.loaders import Names
from batchnorm.studies.settings import Recipe, Setting
from tests.study.tasks import run_task

_OWN = """
import keras
import numpy as np
from keras import layers, ops


class Batches(keras.utils.PyDataset):
    def __init__(self, first, count):
        super().__init__()
        random = np.random.default_rng(first)
        self.x = random.standard_normal((8 * count, 4)).astype("float32")
        self.y = np.stack([self.x[:, 0] - self.x[:, 1], np.abs(self.x[:, 2])], 1)

    def __len__(self):
        return len(self.x) // 8

    def __getitem__(self, index):
        rows = slice(8 * index, 8 * index + 8)
        return self.x[rows], self.y[rows]


def data():
    return Batches(0, 8), Batches(1, 4)


def net(norm):
    return keras.Sequential([layers.Dense(8), norm(8, activation="relu"), layers.Dense(2)])


def tripled(outputs, targets):
    return 3 * ops.mean((outputs - targets) ** 2)


def by_class(outputs, targets):
    assert "int" in str(targets.dtype)
    return ops.mean(keras.losses.sparse_categorical_crossentropy(targets, outputs, from_logits=True))


def no_scalar(outputs, targets):
    return (outputs - targets) ** 2


def tokens():
    random = np.random.default_rng(0)
    rows = []
    for i in range(24):
        valid = np.arange(6) < random.integers(2, 6)
        rows.append(({"tokens": random.integers(1, 9, 6) * valid, "mask": valid}, i % 2))
    return iter(rows[:16]), iter(rows[16:])


def reads(norm):
    tokens, mask = keras.Input((None,), dtype="int32", name="tokens"), keras.Input((None,), name="mask")
    x = norm(4, spatial_dims=1)(layers.Embedding(9, 4)(tokens))
    weight = ops.expand_dims(mask, -1)
    mean = ops.sum(x * weight, 1) / ops.sum(weight, 1)
    return keras.Model({"tokens": tokens, "mask": mask}, layers.Dense(2)(mean))
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(_OWN)
    return str(path)


def learner(own: str, loss: str, targets: Any = "numbers", data: str = "data") -> KerasLearner:
    found = load_data(f"{own}:{data}", targets=targets)
    return make_learner(
        Setting("d", f"{own}:net", 8), Recipe(loss=loss), parse_arm("none"), found, 0, 1e-3, False
    )


def test_a_py_dataset_is_read_batch_by_batch(own: str) -> None:
    found = load_data(f"{own}:data", targets="numbers")
    assert (found.x_train.shape, found.y_train.shape, found.x_test.shape) == ((64, 4), (64, 2), (32, 4))
    random = np.random.default_rng(0)
    np.testing.assert_array_equal(found.x_train, random.standard_normal((64, 4)).astype(np.float32))


@pytest.mark.on_every_backend
def test_a_step_is_that_of_the_loss(own: str) -> None:
    found = load_data(f"{own}:data", targets="numbers")
    x, y = found.x_train[:8], found.y_train[:8]
    with session():
        once = learner(own, "mse")
        outputs = once.predict(x)
        assert isinstance(outputs, np.ndarray)
        expected = ((outputs - y) ** 2).mean()
        assert once.step(x, y) == pytest.approx(expected, rel=1e-5)
        thrice = learner(own, f"{own}:tripled", "any")
        assert thrice.step(x, y) == pytest.approx(3 * expected, rel=1e-5)
        outputs = thrice.predict(x)
        assert isinstance(outputs, np.ndarray)
        assert thrice.loss(outputs, y) == pytest.approx(3 * ((outputs - y) ** 2).mean(), rel=1e-5)
        assert thrice.step(x, y) == pytest.approx(3 * ((outputs - y) ** 2).mean(), rel=1e-5)


def test_numbers_are_learned_and_judged_by_r2(own: str) -> None:
    found = load_data(f"{own}:data", targets="numbers")
    task = run_task(f"{own}:net", rate=3e-2, batch_size=8, epochs=8, loss="mse", metric="r2")
    with session():
        run = training.train(task, found, make_learner, lambda _: None)
    assert run.epochs[0].test_accuracy < run.accuracy < 1
    assert run.accuracy > 0.3
    assert run.epochs[-1].test_loss < run.epochs[0].test_loss


@pytest.mark.on_every_backend
def test_a_loss_of_ones_own_gets_classes_as_whole_numbers(own: str) -> None:
    x, y = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32), np.arange(16) % 2
    found = own_data("data", "data", (x, y, x, y), "any")
    with session():
        ours, kerass = (
            make_learner(
                Setting("d", f"{own}:net", 8), Recipe(loss=loss), parse_arm("none"), found, 0, 1e-3, False
            )
            for loss in (f"{own}:by_class", "cross_entropy")
        )
        assert ours.step(x, y) == pytest.approx(kerass.step(x, y), rel=1e-5)
        outputs = ours.predict(x)
        assert isinstance(outputs, np.ndarray)
        assert ours.loss(outputs, y) == pytest.approx(
            objectives.mean_loss("cross_entropy", outputs, y), rel=1e-5
        )


def test_a_loss_that_is_no_scalar_is_one_line(own: str) -> None:
    found = load_data(f"{own}:data", targets="any")
    with (
        session(),
        pytest.raises(StudyError, match=r"returned a tensor of shape \[.*2\], not a tensor with one"),
    ):
        learner(own, f"{own}:no_scalar", "any").step(found.x_train[:8], found.y_train[:8])


@pytest.mark.on_every_backend
def test_inputs_go_by_their_names(own: str) -> None:
    found = load_data(f"{own}:tokens")
    assert found.names == Names("tokens", "mask", takes_mask=True)
    with session():
        run = training.train(run_task(f"{own}:reads", batch_size=8), found, make_learner, lambda _: None)
    assert run.movements is not None
    assert (run.movements.running.by_mates, run.movements.running.by_padding) == (0, 0)


@pytest.mark.one_backend  # arrays, whatever the backend
def test_a_tf_data_set_is_read_whether_batched_or_not() -> None:
    import tensorflow as tf

    x, y = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32), np.arange(10) % 2
    rows = tf.data.Dataset.from_tensor_slices((x, y))
    found = own_data("data", "data", (rows, rows.batch(4)))
    np.testing.assert_array_equal(found.x_train, x)
    np.testing.assert_array_equal(found.x_test, x)
    np.testing.assert_array_equal(found.y_test, y)
