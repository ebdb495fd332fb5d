"""Compiled kernels on disk, by Numba's cache: with a digest, so that nothing damaged is unpickled or run.

Numba itself raises for a damaged file, in every process until the file is deleted; and it runs code in which
a few bytes are wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numba.core.caching import IndexDataCacheFile
from numba.core.ccallback import CFunc

_DIGEST = 32  # bytes, behind all that Numba reads


class Kept(CFunc):
    """A function in machine code, at an address, which is looked up on disk first."""

    def enable_caching(self) -> None:
        """Let `compile` look on disk, and write there."""
        super().enable_caching()
        vars(self)["_cache"]._cache_file.__class__ = _WholeFiles


class _WholeFiles(IndexDataCacheFile):
    """Files of one function: an index, and one for each signature. What is not whole is not there."""

    def _load_index(self) -> Any:
        return super()._load_index() if _is_whole(self._index_path) else {}

    def _load_data(self, name: str) -> Any:
        if not _is_whole(self._data_path(name)):
            raise OSError(f"{name} is damaged")  # for Numba it is gone: compiled again, and written over
        return super()._load_data(name)

    @contextlib.contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        with super()._open_for_write(filepath) as file:
            yield content
            file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest())


def _is_whole(path: str) -> bool:
    """Whether the digest at the end of a file fits; a file that is not there is for Numba to miss."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return True
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]
