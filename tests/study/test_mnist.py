"""MNIST's files as they come, damaged, and made to harm: what they hold, or one line that names them."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from batchnorm.errors import DataError
from batchnorm.studies.data import load_data
from batchnorm.studies.mnist import load_mnist, read_idx

from .idx import idx, some_mnist

KERAS = ("x_train", "y_train", "x_test", "y_test")


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


def keras(**changed: object) -> dict[str, np.ndarray]:
    return {**dict(zip(KERAS, some_mnist().values(), strict=True)), **changed}  # type: ignore[dict-item]


def refused(call: Callable[[], object], *parts: str) -> None:
    """Raise unless a call is refused in one line with these parts, within 60 MB."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            call()
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "labels",
    [
        np.arange(20.0) % 10, np.full(20, np.nan), np.arange(20) % 10 - 1,
        np.arange(20) % 10 * 1j, np.arange(20),
        (np.arange(20) % 10).astype(str), np.array([{}] * 20), np.zeros(20, bool), np.zeros(20, "M8[s]"),
        np.zeros(20, [("a", int)]), np.zeros((20, 1), int), np.zeros(19, int), np.array(3),
    ],
    ids=lambda labels: f"{labels.dtype.str}{labels.shape}",
)  # fmt: skip
def test_labels_that_are_no_digits_are_refused(tmp_path: Path, labels: np.ndarray) -> None:
    np.savez(tmp_path / "mnist.npz", **keras(y_train=labels))  # type: ignore[arg-type]
    refused(lambda: load_mnist(tmp_path), str(tmp_path / "mnist.npz"))


def test_labels_of_other_whole_numbers_are_digits(tmp_path: Path) -> None:
    for dtype in (np.int64, ">i2", np.uint32):
        np.savez(tmp_path / "mnist.npz", **keras(y_train=(np.arange(20) % 10).astype(dtype)))
        assert load_data("mnist", tmp_path).y_train.tolist() == [*range(10), *range(10)]


def header(array: np.ndarray, shape: tuple[int, ...]) -> bytes:
    """An array as NumPy writes it, with another shape in its header."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"descr": array.dtype.str, "fortran_order": False, "shape": shape}
    )
    return content.getvalue() + array.tobytes()


def member(content: bytes, how: Callable[[zipfile.ZipInfo], None] = lambda _: None, method: int = 0) -> bytes:
    """A mnist.npz whose x_train is this content."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, array in keras().items():
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = method if name == "x_train" else zipfile.ZIP_DEFLATED
            part = io.BytesIO()
            np.save(part, array)
            archive.writestr(info, content if name == "x_train" else part.getvalue())
            if name == "x_train":
                how(info)
    return packed.getvalue()


IMAGES = np.zeros((20, 28, 28), np.uint8)
NPZ: dict[str, Callable[[], bytes]] = {
    "no zip": lambda: b"an error page of a web server",
    "empty": lambda: b"",
    "an IDX file": lambda: idx(IMAGES),
    "a member that is no array": lambda: member(b"text"),
    "a member without content": lambda: member(b""),
    "713 TiB": lambda: member(header(IMAGES, (10**6, 28 * 1000, 28 * 1000))),
    "one image more than there is": lambda: member(header(IMAGES, (21, 28, 28))),
    "one image less than there is": lambda: member(header(IMAGES, (19, 28, 28))),
    "negative lengths": lambda: member(header(IMAGES, (20, -28, -28))),
    "a shape beyond integers": lambda: member(header(IMAGES, (10**400,))),
    "encrypted": lambda: member(header(IMAGES, IMAGES.shape), lambda info: setattr(info, "flag_bits", 1)),
    "unknown compression": lambda: member(
        header(IMAGES, IMAGES.shape), lambda info: setattr(info, "compress_type", 99)
    ),
    "LZMA, which may ask for 4 GiB": lambda: member(header(IMAGES, IMAGES.shape), method=zipfile.ZIP_LZMA),
    "zeros": lambda: member(bytes(10_000_000), method=zipfile.ZIP_DEFLATED),
    "too large": lambda: member(b"", lambda info: setattr(info, "file_size", 2**31)),
    "without x_train": lambda: gone(),
}


def gone() -> bytes:
    packed = io.BytesIO()
    np.savez(packed, y_train=IMAGES)
    return packed.getvalue()


@pytest.mark.parametrize("how", NPZ)
def test_what_is_no_mnist_npz_is_named_and_not_unpacked(tmp_path: Path, how: str) -> None:
    (tmp_path / "mnist.npz").write_bytes(NPZ[how]())
    refused(lambda: load_mnist(tmp_path), str(tmp_path / "mnist.npz"), "download it again")


def test_no_more_is_unpacked_than_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(idx(IMAGES)[:16] + bytes(100_000_000), 1))
    refused(lambda: read_idx(path, 3), str(path), "20 x 28 x 28", "more follow")
    path.write_bytes(gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1)))
    refused(lambda: read_idx(path, 3), str(path), "is no set of digits")
    path.write_bytes(gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 2**18, 28, 28)))
    refused(lambda: read_idx(path, 3), str(path), "and 0 follow")


def test_devices_pipes_and_files_beyond_reason_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: read_idx(tmp_path / "pipe", 3), "no regular file")
    refused(lambda: read_idx(Path("/dev/zero"), 3), "no regular file")
    (tmp_path / "mnist.npz").symlink_to("/dev/zero")
    refused(lambda: load_mnist(tmp_path), "MNIST is not in")
    (tmp_path / "mnist.npz").unlink()
    for name in ("mnist.npz", "train-images-idx3-ubyte"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 2**40)
    refused(lambda: load_mnist(tmp_path), "mnist.npz has 1099511627776 bytes")
    refused(lambda: read_idx(tmp_path / "train-images-idx3-ubyte", 3), "has 1099511627776 bytes")
