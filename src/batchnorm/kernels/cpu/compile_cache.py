"""Stores compiled kernels in Numba's cache on disk, with a digest, so that no damaged file is loaded.

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

from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from numba.core.runtime import rtsys

_DIGEST = 32  # bytes, at the end of a file, after the content that Numba reads


class Kept(CFunc):
    """A function compiled to machine code at an address, loaded from disk if it is there."""

    def enable_caching(self) -> None:
        """Lets `compile` load the function from disk, or write it there."""
        super().enable_caching()
        cache = vars(self)["_cache"]
        cache.__class__ = _Cache
        cache._cache_file.__class__ = _WholeFiles


class _Cache(FunctionCache):
    """Numba's cache of one function."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Returns the compiled function, None where there is none that is whole.

        Numba would first import all that it can compile, which takes as long as importing Numba itself. A
        compiled function needs its memory management alone; before it compiles, Numba imports the rest.
        """
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


class _WholeFiles(IndexDataCacheFile):
    """Files of one function: an index, and one for each signature. A damaged file counts as missing."""

    def _load_index(self) -> Any:
        return super()._load_index() if _is_whole(self._index_path) else {}

    def _load_data(self, name: str) -> Any:
        if not _is_whole(self._data_path(name)):
            # Numba takes it for a missing one, compiles, and overwrites it.
            raise OSError(f"{name} is damaged")
        return super()._load_data(name)

    @contextlib.contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        with super()._open_for_write(filepath) as file:
            yield content
            file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest())


def cache_folder() -> Path | None:
    """Returns the folder of the compiled functions, None where Numba finds none that can be written to."""
    try:
        # Numba chooses a folder by that of a function's source: it is the same for all in this folder.
        return Path(FunctionCache(_is_whole).cache_path)
    except RuntimeError:
        return None


def _is_whole(path: str) -> bool:
    """Returns whether the digest at the end of a file is right; true for a missing one, left to Numba."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return True
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]
