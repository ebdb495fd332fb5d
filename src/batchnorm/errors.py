"""What the library raises: one message that says what was received, where, and what to do.

Each class is also the built-in exception that the stock layer raises in its place, so that code written
for the stock layer catches ours.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Self

# Top-level package that a missing import names -> the extra that brings it.
EXTRAS = {
    "torch": "torch",
    "keras": "keras",
    "rich": "study",
    "filelock": "study",
    "distributed": "cluster",
}


# What moves the cursor or colours a terminal, ends a line, or turns the direction of writing.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def in_one_line(text: str) -> str:
    """Return `text` as one line that a terminal only shows, whatever a file's name or content put into it."""
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], " ".join(text.splitlines()))


class BatchNormError(Exception):
    """Base of every error that this library raises on purpose.

    Args:
        message: what was received and what to do about it, in one sentence or two.
        layer: qualified name of the layer, such as `features.3 (BatchNorm2d)`, where it is known.
    """

    def __init__(self, message: str, layer: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.layer = layer

    def __str__(self) -> str:
        return f"{self.layer}: {self.message}" if self.layer else self.message

    def at(self, layer: str) -> Self:
        """Return this error with the layer's name in front, unless it has one."""
        self.layer = self.layer or layer
        return self


class InputShapeError(BatchNormError, ValueError, RuntimeError):
    """A tensor has the wrong number of dimensions, channels or values per channel."""


class InputTypeError(BatchNormError, TypeError, RuntimeError):
    """A tensor has a dtype, or lives on a device, that the operation cannot take."""


class OptionError(BatchNormError, ValueError):
    """An option has a value outside its range."""


class ArgumentTypeError(OptionError, TypeError):
    """An argument is of a type that the call cannot take."""


class NonFiniteError(BatchNormError, FloatingPointError):
    """The input of a layer that refuses it (`nonfinite="raise"`) has inf or NaN."""


class DataError(BatchNormError, ValueError):
    """Data that was handed over cannot be read or has the wrong form."""


class FileError(BatchNormError, OSError):
    """A file cannot be written or read."""


class RankError(BatchNormError, RuntimeError):
    """Another process of torch.distributed raised, is missing or went astray, so that this one stops too."""


class RecomputeError(BatchNormError, RuntimeError):
    """Activation checkpointing computes a forward again, and what it was the first time is not known."""


class MissingExtraError(BatchNormError, ImportError):
    """A framework that the name needs is not installed."""

    def __init__(self, name: str, package: str, extra: str) -> None:
        super().__init__(
            f"{name} needs {package}, which is not installed: pip install 'batchnorm[{extra}]'",
        )
        self.name = package


@contextlib.contextmanager
def naming_the_extra(name: str) -> Iterator[None]:
    """Within this context, a framework that is missing is a MissingExtraError of the public `name`."""
    try:
        yield
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingExtraError(name, package, EXTRAS[package]) from missing
