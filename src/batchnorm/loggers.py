"""Hands rows of numbers to a logger: a function, TensorBoard, W&B, Lightning's loggers, or a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from .errors import ArgumentTypeError, DataError, OptionError
from .files import naming, open_regular

Row: TypeAlias = dict[str, float]
LogFunction: TypeAlias = Callable[[Row, int], object]
_HEADER = "step,name,value"


@runtime_checkable
class ScalarWriter(Protocol):
    """Takes one number at a time, as TensorBoard's SummaryWriter does."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Log one number."""


@runtime_checkable
class MetricsLogger(Protocol):
    """Takes a row, as the loggers of Lightning do."""

    def log_metrics(self, metrics: Row, step: int, /) -> object:
        """Log a row."""


@runtime_checkable
class Run(Protocol):
    """Takes a row, as a run of W&B does."""

    def log(self, data: Row, /, *, step: int) -> object:
        """Log a row."""


Log: TypeAlias = LogFunction | ScalarWriter | MetricsLogger | Run | str | Path


def check_every(every: object) -> None:
    """Raise OptionError unless `every` is a number of steps."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise OptionError(f"every is a number of steps, 1 or more; got {every!r}")


def log_function(log: Log) -> LogFunction:
    """Return the function of (row, step) that hands rows to `log`; no library is imported for it.

    Args:
        log: such a function; TensorBoard's SummaryWriter, a run of W&B or a logger of Lightning; or the path
            of a CSV file with the columns step, name and value, to which rows are added.

    Raises:
        ArgumentTypeError: (a TypeError) it is none of these.
        FileError: (an OSError) the file cannot be written.
        DataError: (a ValueError) the file is there, with other columns.
    """
    if isinstance(log, (str, Path)):
        return _csv(Path(log))
    if isinstance(log, ScalarWriter):
        return lambda row, step: [log.add_scalar(name, value, step) for name, value in row.items()]
    if isinstance(log, MetricsLogger):
        return log.log_metrics
    if isinstance(log, Run):
        return lambda row, step: log.log(row, step=step)
    if not callable(log):
        raise ArgumentTypeError(
            "log is a function of (dict, step), a SummaryWriter, a run of W&B, a logger of Lightning, or the "
            f"path of a CSV file; got {log!r}"
        )
    return log


def _csv(path: Path) -> LogFunction:
    """Return what appends rows to a file, which is open only while it does: nothing is lost in a crash."""
    if path.exists():
        with open_regular(path) as before:
            first = before.readline(1000).strip()
        if first not in (b"", _HEADER.encode()):
            raise DataError(f"{path} is not a file of such rows: it has not the columns {_HEADER}")
    with naming(path, "written"), path.open("a", newline="", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(_HEADER + "\n")

    def append(row: Row, step: int) -> None:
        with naming(path, "written"), path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows((step, *item) for item in row.items())

    return append
