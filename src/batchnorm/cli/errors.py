"""Turns errors that a user can cause into one line on stderr and an exit code; tracebacks on request only."""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Iterator

import typer

from batchnorm.errors import BatchNormError, FileError, OptionError, in_one_line

from .interrupt import INTERRUPTED, raising_interrupts


@contextlib.contextmanager
def one_clear_line(debug: bool, kept: str = "") -> Iterator[None]:
    """Turn errors into one line and an exit code: 2 for a wrong option, 1 for the rest, 130 for Ctrl-C.

    Args:
        debug: show the traceback too.
        kept: says, behind an error of a file, which results are safe.
    """
    try:
        with raising_interrupts():
            yield
    except KeyboardInterrupt as interrupted:
        _fail(str(interrupted) or "stopped", INTERRUPTED)
    except (BatchNormError, OSError) as error:
        if debug:
            typer.echo(getattr(error, "details", None) or traceback.format_exc(), err=True)
        _fail(_told(error, kept), 2 if isinstance(error, OptionError) else 1)


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show each UserWarning as one line on stderr, without the place in the code before it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        try:
            yield
        finally:
            for warning in caught:
                if issubclass(warning.category, UserWarning):
                    typer.echo(f"warning: {in_one_line(str(warning.message))}", err=True)


def _told(error: BatchNormError | OSError, kept: str) -> str:
    if not isinstance(error, OSError):
        return f"error: {error}"
    text = str(error) if isinstance(error, FileError) else error.strerror or str(error)
    where = f"{error.filename}: " if error.filename else ""
    return f"error: {where}{text}{'; ' if kept else ''}{kept}"


def _fail(line: str, code: int) -> None:
    typer.echo(in_one_line(line), err=True)
    sys.exit(code)
