"""Finds and reads the full MNIST: IDX files, plain or gzipped, or Keras's `mnist.npz`."""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from batchnorm.errors import DataError, FileError, in_one_line
from batchnorm.files import read_within

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[Any]
Arrays = tuple[Bytes, Labels, Bytes, Labels]

# (stem of the name, dimensions), in the order x_train, y_train, x_test, y_test.
_FILES = (("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1))
# The same of Keras's file, with the kinds of their dtypes: whole numbers.
_KERAS_ARRAYS = {"x_train": "u", "y_train": "iu", "x_test": "u", "y_test": "iu"}
_UNSIGNED_BYTE = 0x08
_CHUNK = 2**20
# MNIST's largest file has 47 million bytes, and EMNIST's digits, in the same format, have 190 million.
_MOST_BYTES = 2**28
_HOW_TO_GET_IT = (
    "put mnist.npz (https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz) or the four IDX "
    "files (https://ossci-datasets.s3.amazonaws.com/mnist/) into a folder, and name it with --data-dir"
)
_AGAIN = "download it again"
_LONGEST_HEADER = 2**16
_LONGEST_MESSAGE = 160
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def load_mnist(data_dir: Path | None = None) -> tuple[Arrays, str]:
    """Reads MNIST from a folder or from the caches that Keras and torchvision leave.

    Args:
        data_dir: a folder with the IDX files or `mnist.npz`, or with a torchvision or Keras cache below it.
            Without one, the current folder, `./data`, the home folder and Keras's cache are looked through.

    Returns:
        `(x_train, y_train, x_test, y_test)` as bytes, `[N, 28, 28]` and `[N]`, and where they came from.

    Raises:
        DataError: nothing is there, or a file is broken.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(f"--data-dir {data_dir} is not a folder")
    folders = list(_candidate_folders(data_dir))
    for folder in folders:
        if (folder / "mnist.npz").is_file():
            return _read_keras_npz(folder / "mnist.npz"), "MNIST (LeCun, Cortes and Burges), from mnist.npz"
        paths = [_find_idx(folder, stem, dimensions) for stem, dimensions in _FILES]
        if any(paths):
            return _read_idx_files(folder, paths), "MNIST (LeCun, Cortes and Burges), from its IDX files"
    looked = ", ".join(str(folder) for folder in folders)
    raise DataError(f"MNIST is not in {looked}: {_HOW_TO_GET_IT}")


def read_idx(path: Path, dimensions: int) -> Bytes:
    """Reads one IDX file of bytes, plain or gzipped.

    The format: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, each dimension as a
    big-endian 32-bit integer, then the values. No more is unpacked than the header says.

    Raises:
        DataError: the file cannot be read, is not IDX of that many dimensions, is shorter or longer than it
            says, or says more than any set of digits has.
    """
    try:
        content = read_within(path, _MOST_BYTES)
        plain = io.BytesIO(content)
        with gzip.GzipFile(fileobj=plain) if content[:2] == b"\x1f\x8b" else plain as stream:
            return _read_idx(path, dimensions, stream)
    except DataError:
        raise
    except FileError as error:
        raise DataError(f"{error}; {_AGAIN}") from error
    except (OSError, EOFError, zlib.error) as broken:
        raise DataError(f"{path} cannot be read: {broken}; {_AGAIN}") from broken


def _read_idx(path: Path, dimensions: int, stream: io.BufferedIOBase) -> Bytes:
    header = stream.read(4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
        raise DataError(
            f"{path} is not an IDX file of bytes in {dimensions} dimensions: it starts with "
            f"{header[:4].hex(' ') or 'nothing'}; {_AGAIN}"
        )
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size = math.prod(shape)
    claim = f"its header says {' x '.join(map(str, shape))} bytes"
    if size > _MOST_BYTES:
        raise DataError(f"{path} is no set of digits: {claim}, and none has more than {_MOST_BYTES:,}")
    values = bytearray()
    while chunk := stream.read(min(_CHUNK, size + 1 - len(values))):
        values += chunk
    if len(values) != size:
        follow = "more" if len(values) > size else f"{len(values):,}"
        raise DataError(f"{path} is damaged: {claim}, and {follow} follow; {_AGAIN}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _candidate_folders(data_dir: Path | None) -> Iterator[Path]:
    if data_dir is not None:
        for below in ("", "MNIST/raw", "raw", "datasets", ".keras/datasets"):
            yield data_dir / below
        return
    for root in (Path(), Path("data"), Path.home(), Path.home() / "data"):
        yield root
        yield root / "MNIST" / "raw"
    yield Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "datasets"


def _find_idx(folder: Path, stem: str, dimensions: int) -> Path | None:
    for joint in ("-", "."):
        for ending in ("", ".gz"):
            path = folder / f"{stem}{joint}idx{dimensions}-ubyte{ending}"
            if path.is_file():
                return path
    return None


def _read_idx_files(folder: Path, paths: list[Path | None]) -> Arrays:
    for path, (stem, dimensions) in zip(paths, _FILES, strict=True):
        if path is None:
            raise DataError(f"{folder} holds some of MNIST, but no {stem}-idx{dimensions}-ubyte or .gz of it")
    pairs = zip(paths, _FILES, strict=True)
    return _checked([read_idx(path, dimensions) for path, (_, dimensions) in pairs if path], folder)


def _read_keras_npz(path: Path) -> Arrays:
    try:
        arrays = read_npz(path, _KERAS_ARRAYS, _MOST_BYTES)
    except DataError as error:
        raise DataError(f"{error}: it is not Keras's mnist.npz; {_AGAIN}") from error
    return _checked(arrays, path)


def _checked(arrays: Sequence[Labels], where: Path) -> Arrays:
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or len(images) == 0:
            raise DataError(f"{where}: images of shape {images.shape} do not go with labels {labels.shape}")
        if images.dtype != np.uint8 or labels.min() < 0 or labels.max() > 9:
            span = f"{labels.min()} to {labels.max()}"
            raise DataError(f"{where}: not digits: images of {images.dtype}, labels {span}")
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise DataError(
            f"{where}: training images are {arrays[0].shape[1:]}, held-out ones {arrays[2].shape[1:]}"
        )
    return arrays[0], arrays[1], arrays[2], arrays[3]


def read_npz(path: Path, kinds: Mapping[str, str], most: int) -> list[Labels]:
    """Reads arrays by name.

    Args:
        path: of the file.
        kinds: for each name, which kinds of dtype are right, such as "iu" (NumPy's `dtype.kind`).
        most: bytes of one array, and of the file.

    Raises:
        DataError: the file cannot be read, or holds no such arrays within these bounds.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(read_within(path, most))) as archive:
            return [_read(archive, name, kind, most) for name, kind in kinds.items()]
    except (DataError, FileError) as error:
        said = str(error)
        raise DataError(said if str(path) in said else f"{path}: {said}") from error
    except Exception as broken:  # zipfile and NumPy raise a dozen kinds of errors on damaged files
        said = in_one_line(str(broken) or type(broken).__name__)[:_LONGEST_MESSAGE]  # parts of the file, too
        raise DataError(f"{path} cannot be read as .npz: {said}") from broken


def _read(archive: zipfile.ZipFile, name: str, kinds: str, most: int) -> Labels:
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Others can ask for gigabytes before the first byte, and NumPy writes none of them.
        raise DataError(f"{name} is compressed by method {member.compress_type}, which NumPy does not write")
    if member.file_size > most + _LONGEST_HEADER:
        raise DataError(f"{name} has {member.file_size:,} bytes, where at most {most:,} can be right")
    with archive.open(member) as file:
        shape, is_fortran, dtype = _header(file)
        size = math.prod(shape) * dtype.itemsize
        left = member.file_size - file.tell()
        if dtype.kind not in kinds or min(shape, default=1) < 1 or size != left:
            raise DataError(f"{name} claims to be {dtype} of shape {_shown(shape)}, in {left:,} bytes")
        content = file.read(size)
    return np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise DataError(f"an array in NumPy's format {version} was not expected")
    return _HEADERS[version](file)


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{length:.3g}" if length > 1e9 else str(length) for length in shape[:4])
