"""Arrays of a `.npz` file that is not trusted: nothing is unpickled, no claim about a size believed."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from batchnorm.errors import DataError, FileError, in_one_line
from batchnorm.files import read_within

Array = npt.NDArray[Any]

_LONGEST_HEADER = 2**16
_LONGEST_MESSAGE = 160
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npz(path: Path, kinds: Mapping[str, str], most: int) -> list[Array]:
    """Read arrays by name.

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


def _read(archive: zipfile.ZipFile, name: str, kinds: str, most: int) -> Array:
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
