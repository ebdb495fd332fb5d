"""Files: written whole or not at all, and read within a bound, whatever lies at their path."""

from __future__ import annotations

import contextlib
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
    if path.is_dir():
        raise FileError(f"{path} cannot be written: it is a folder")
    with naming(path, "written"), _draft(path) as (_, handle):
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
        # A pipe that nobody writes to would hold back a plain open.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
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
    draft = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        yield draft, handle
    finally:
        draft.unlink(missing_ok=True)
