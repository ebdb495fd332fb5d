"""Own data as data sets and loaders: every kind gives the same arrays, and what is wrong is one line."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from batchnorm.errors import DataError
from batchnorm.studies.data import load_data, own_data
from batchnorm.studies.errors import StudyError
from batchnorm.studies.loaders import Names, read

X = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
Y = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
LENGTHS = np.array([1, 4, 2, 3, 4, 1, 2, 4, 3, 2])
FRAMES = np.random.default_rng(1).standard_normal((10, 4, 2)).astype(np.float32)
FRAMES[np.arange(4) >= LENGTHS[:, None]] = 0
TOKENS = np.random.default_rng(2).integers(1, 9, (10, 4)) * (np.arange(4) < LENGTHS[:, None])
MASK = (np.arange(4) < LENGTHS[:, None]).astype(np.int64)


class Rows(Dataset[Any]):
    """What a function returns for each of ten numbers."""

    def __init__(self, row: Callable[[int], Any]) -> None:
        self.row = row

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return self.row(index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(X, Y, strict=True)


class Untyped:
    """Rows as a data set of another library has them."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": X[index].tolist(), "label": int(Y[index])}


def tensors() -> TensorDataset:
    return TensorDataset(torch.tensor(X), torch.tensor(Y))


PLAIN: dict[str, Callable[[], Any]] = {
    "data set": tensors,
    "loader": lambda: DataLoader(tensors(), batch_size=4),
    "loader without batches": lambda: DataLoader(tensors(), batch_size=None),
    "iterable data set": Stream,
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=3),
    "generator of batches": lambda: ((X[i : i + 3], Y[i : i + 3]) for i in range(0, 10, 3)),
    "generator of examples": lambda: zip(X, Y, strict=True),
    "dicts": lambda: Rows(lambda i: {"x": torch.tensor(X[i]), "labels": Y[i]}),
    "another library's": Untyped,
}


@pytest.mark.parametrize("kind", PLAIN)
def test_every_kind_gives_the_same_arrays(kind: str) -> None:
    loaded = read("data", PLAIN[kind]())
    np.testing.assert_array_equal(loaded.x, X)
    np.testing.assert_array_equal(loaded.y, Y)
    assert loaded.lengths is None


def _trimmed(i: int) -> Any:
    return FRAMES[i, : LENGTHS[i]], Y[i]


def _padded_batches() -> Iterator[Any]:
    for rows in (slice(0, 1), slice(1, 6), slice(6, 10)):  # the first is of length 1
        longest = LENGTHS[rows].max()
        yield (torch.tensor(FRAMES[rows, :longest]), torch.tensor(LENGTHS[rows])), torch.tensor(Y[rows])


PADDED: dict[str, Callable[[], Any]] = {
    "of their own lengths": lambda: Rows(_trimmed),
    "batches with lengths": _padded_batches,
    "examples with lengths": lambda: Rows(lambda i: ((FRAMES[i], LENGTHS[i]), Y[i])),
    "examples with a mask": lambda: Rows(lambda i: ((FRAMES[i], MASK[i] > 0), Y[i])),
    "batches with a mask": lambda: DataLoader(Rows(lambda i: ((FRAMES[i], MASK[i]), Y[i])), batch_size=4),
    "dicts with lengths": lambda: Rows(lambda i: {"frames": FRAMES[i], "length": LENGTHS[i], "y": Y[i]}),
    "inputs in a dict": lambda: Rows(lambda i: ({"frames": FRAMES[i], "mask": MASK[i]}, Y[i])),
}


@pytest.mark.parametrize("kind", PADDED)
def test_lengths_come_from_lengths_masks_or_shapes(kind: str) -> None:
    loaded = read("data", PADDED[kind]())
    np.testing.assert_array_equal(loaded.x, FRAMES)
    np.testing.assert_array_equal(loaded.lengths, LENGTHS)


def test_tokens_of_a_dict_stay_whole_numbers_and_keep_their_names() -> None:
    rows = Rows(lambda i: {"input_ids": TOKENS[i], "attention_mask": MASK[i], "labels": Y[i]})
    data = own_data("data", "data", (rows, DataLoader(rows, batch_size=5)))
    assert data.names == Names("input_ids", "attention_mask", takes_mask=True)
    assert data.x_train.dtype == np.int64
    np.testing.assert_array_equal(data.x_test, TOKENS)
    np.testing.assert_array_equal(data.lengths_train, LENGTHS)


def test_parts_are_padded_to_one_length() -> None:
    short = [(FRAMES[i, : min(LENGTHS[i], 2)], Y[i]) for i in range(10)]
    data = own_data("data", "data", {"train": Rows(_trimmed), "test": Rows(lambda i: short[i])})
    np.testing.assert_array_equal(data.x_train, FRAMES)
    assert data.x_test.shape == (10, 4, 2)
    np.testing.assert_array_equal(data.lengths_test, np.minimum(LENGTHS, 2))


def test_pairs_of_arrays_are_taken_as_keras_has_them() -> None:
    data = own_data("data", "data", ((X, Y), (X[:4], Y[:4])))
    np.testing.assert_array_equal(data.x_train, X)
    np.testing.assert_array_equal(data.y_test, Y[:4])


def test_shuffled_data_is_the_same_data_each_time_and_no_random_state_moves() -> None:
    loader = DataLoader(tensors(), batch_size=4, shuffle=True)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index, union-attr]
    first, again = read("data", loader), read("data", loader)
    np.testing.assert_array_equal(first.x, again.x)
    assert not np.array_equal(first.x, X)  # type: ignore[arg-type]
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index, union-attr]


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: iter(()), "yields no examples"),
    "no pair": (lambda: Rows(lambda i: X[i]), r"yields a ndarray: yield \(x, y\)"),
    "weights": (lambda: Rows(lambda i: (X[i], Y[i], 1.0)), r"yields a tuple of 3: yield \(x, y\)"),
    "no targets": (lambda: Rows(lambda i: {"x": X[i]}), "dicts without targets: name them labels"),
    "two targets": (lambda: Rows(lambda i: {"x": X[i], "y": 1, "label": 1}), "label and y, .* keep one"),
    "two inputs": (
        lambda: Rows(lambda i: {"a": X[i], "b": X[i], "y": 1}),
        "inputs a, b: .* leave the others",
    ),
    "no input": (lambda: Rows(lambda i: {"length": i, "y": 1}), "dicts with no input"),
    "gaps": (lambda: Rows(lambda i: ((FRAMES[i], [1, 0, 1, 0]), Y[i])), "mask with gaps"),
    "padding in front": (lambda: Rows(lambda i: ((FRAMES[i], MASK[i][::-1]), Y[i])), "padding in front"),
    "a mask too long": (lambda: Rows(lambda i: ((FRAMES[i], [1] * 5), Y[i])), r"\(1, 5\) beside inputs"),
    "lengths no numbers": (lambda: Rows(lambda i: ((FRAMES[i], 1.5), Y[i])), "lengths of float64"),
    "unknown padding": (
        lambda: iter([(FRAMES[:2, :3], Y[:2]), (FRAMES[2:], Y[2:])]),
        r"shapes \(3, 2\) and \(4, 2\): yield \(\(x, lengths\), y\)",
    ),
    "other shapes": (
        lambda: Rows(lambda i: (np.ones((4, 2 + i % 2)), Y[i])),
        "only the first dimension may vary",
    ),
    "fewer targets": (lambda: iter([(X, Y[:5])]), r"inputs \(10, 3\) with targets \(5,\)"),
    "ragged targets": (lambda: Rows(lambda i: (X[i], np.ones(1 + i % 2))), "targets of several shapes"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_a_loader_is_one_line(kind: str) -> None:
    loader, said = WRONG[kind]
    with pytest.raises(DataError, match=said):
        read("data", loader())


def test_lengths_are_checked_and_the_example_is_named() -> None:
    for length in (0, 5):
        rows = Rows(lambda i, length=length: ((FRAMES[i], length if i == 3 else 1), Y[i]))
        with pytest.raises(
            DataError, match=f"x_train: example 3 has length {length}, not 1 to 4: leave it out"
        ):
            own_data("data", "data", (rows, rows))


def test_labels_from_1_have_a_remedy() -> None:
    with pytest.raises(DataError, match=r"y_train holds labels from 1 on; .*: subtract 1"):
        own_data("data", "data", (X, Y + 1, X, Y + 1))


def test_classes_that_are_not_held_out_are_told() -> None:
    assert own_data("data", "data", (X, Y, X[:2], Y[:2])).describe()["classes_not_held_out"] == [2]
    assert "classes_not_held_out" not in own_data("data", "data", (X, Y, X, Y)).describe()


def test_numbers_are_checked_as_numbers() -> None:
    data = own_data("data", "data", (X, X[:, 0], X, X[:, 0]), "numbers")
    assert (data.y_train.shape, data.y_train.dtype, data.outputs) == ((10, 1), np.float32, 1)
    assert own_data("data", "data", (X, X[:, :2], X, X[:, :2]), "numbers").outputs == 2
    with pytest.raises(DataError, match="y_train holds 10 values that are NaN"):
        own_data("data", "data", (X, X[:, 0] * np.nan, X, X[:, 0]), "numbers")
    with pytest.raises(
        DataError, match=r"targets are float32 \(2,\) in y_train, and float32 \(1,\) in y_test"
    ):
        own_data("data", "data", (X, X[:, :2], X, X[:, 0]), "numbers")
    with pytest.raises(DataError, match="for other targets take another loss than cross_entropy"):
        own_data("data", "data", (X, X, X, X))


def test_a_loader_that_raises_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "def broken():\n    yield [1.0], 0\n    raise OSError('no disk')\n"
        "def data():\n    return broken(), broken()\n"
    )
    with pytest.raises(StudyError, match=r"OSError: no disk \(own\.py, line 3\)"):
        load_data(f"{path}:data")
