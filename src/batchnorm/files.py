"""Files: written whole or not at all, and read within a bound, whatever lies at their path."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import DataError, FileError


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file that is there in full or not at all, whatever interrupts: power, Ctrl-C or a full disk.

    Args:
        path: of the file. A symbolic link is replaced, not followed.
        content: text is written as UTF-8.

    Raises:
        FileError: it cannot be written; an earlier file is as it was.
    """
    with naming(path, "written"), _draft(path) as (draft, handle):
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)


def check_writable(path: Path) -> None:
    """Raise FileError unless a file can be written at `path`; nothing is left there.

    It is for the time before long work whose result goes there.
    """
    with naming(path, "written"):
        if path.exists() and not path.is_file():  # a rename would replace a device or a pipe
            kind = "it is a folder" if path.is_dir() else "it is no regular file"
            raise FileError(f"{path} cannot be written: {kind}")
        with _draft(path) as (_, handle):
            os.close(handle)


def read_within(path: Path, most: int | None = None) -> bytes:
    """Return the content of a regular file: no device and no pipe, which might have no end.

    Args:
        path: of the file.
        most: bytes; None = any number.

    Raises:
        FileNotFoundError: there is none.
        FileError: it cannot be read, or is no regular file.
        DataError: it is longer than `most`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise DataError(f"{path} has {size} bytes, where at most {most} can be right")
        return file.read(size)


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file to read it; an OSError within this context becomes a FileError that names it.

    Raises:
        FileNotFoundError: there is none.
        FileError: it cannot be read, or is a folder, a device or a pipe.
    """
    with naming(path, "read"):
        # A plain open of a pipe would wait for a process that writes to it.
        handle = _open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode):
                raise FileError(f"{path} cannot be read: it is no regular file")
            yield file


@contextlib.contextmanager
def naming(path: Path, what: str) -> Iterator[None]:
    """Turn an OSError of this context into a FileError that names the file.

    Args:
        path: of the file.
        what: is done to it: "read" or "written". A file to read that is not there stays a FileNotFoundError.
    """
    try:
        yield
    except FileError:
        raise
    except FileNotFoundError as error:
        if what == "read":
            raise
        raise FileError(f"{path} cannot be written: there is no folder {path.parent}") from error
    except OSError as error:
        raise FileError(f"{path} cannot be {what}: {error.strerror or error}") from error


@contextlib.contextmanager
def _draft(path: Path) -> Iterator[tuple[Path, int]]:
    """Make a file beside `path` under a name that is new, and remove it in the end if it is still there."""
    # 50 characters are 200 bytes at most, of the 255 that a name may have.
    draft = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.tmp")
    handle = _open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        yield draft, handle
    finally:
        draft.unlink(missing_ok=True)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
    except ValueError as error:  # a name with a null byte, or one that no file system can hold
        raise OSError(errno.EINVAL, str(error)) from error
