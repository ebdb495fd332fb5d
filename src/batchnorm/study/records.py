"""A study's files: read back only if they are whole and belong to the study asked for."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from batchnorm.errors import DataError
from batchnorm.files import read_within, write_whole

Record = dict[str, Any]

# A run that leaves more has taken some ten million steps.
MOST_OF_A_RUN = 2**28
MOST_OF_A_STUDY = 2**32
_DEEPEST = 20  # levels of lists and objects; what a study writes has six

_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


def write_json(path: Path, value: object) -> None:
    """Write standard JSON: NaN and infinities become null."""
    write_whole(path, json.dumps(json_safe(value), allow_nan=False) + "\n")


def json_safe(value: object) -> object:
    """`value` with every number that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


def read_json(path: Path, most: int) -> object:
    """Return what a file of JSON holds.

    Args:
        path: of the file.
        most: bytes.

    Raises:
        FileNotFoundError: there is none.
        FileError: it cannot be read.
        ValueError: it is no JSON, longer than `most`, or nested deeper than any study's.
    """
    try:
        value = json.loads(read_within(path, most), parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested without end") from None
    if not _is_shallow(value, _DEEPEST):
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    return value


def read_finished(
    path: Path, settings: dict[str, object], is_whole: Callable[[object], bool]
) -> Record | None:
    """The record at `path`, or None where there is none, or none that is whole.

    Args:
        path: a run's file.
        settings: what the record must have been made with.
        is_whole: whether what stands beside the settings is a record.

    Raises:
        DataError: the record was made with other settings, so that going on would mix two studies.
    """
    record = _read_record(path)
    if record is None:
        return None
    stored = record["settings"]
    differences = [
        f"{key if key in settings else _SHORT.repr(key)} {_SHORT.repr(stored.get(key))} "
        f"(now {_SHORT.repr(settings.get(key))})"
        for key in settings | stored
        if json_safe(settings.get(key)) != stored.get(key)
    ]
    if differences:
        raise DataError(
            f"{path} was made with other settings, {', '.join(differences[:8])}: "
            "name another folder with --out, or delete this one"
        )
    return record if is_whole(_without_settings(record)) else None


def read_if_same(path: Path, settings: object, is_whole: Callable[[object], bool]) -> Record | None:
    """The record at `path` if it is whole and made with exactly these settings; None otherwise."""
    record = _read_record(path)
    if record is None or record["settings"] != json_safe(settings) or not is_whole(_without_settings(record)):
        return None
    return record


def settings_at(path: Path) -> object:
    """What the file at `path` was made with; None where there is none that can be read."""
    record = _read_record(path)
    return None if record is None else record["settings"]


def _without_settings(record: Record) -> Record:
    return {key: value for key, value in record.items() if key != "settings"}


def _read_record(path: Path) -> Record | None:
    try:
        record = read_json(path, MOST_OF_A_RUN)
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("settings"), dict) else None


def _is_shallow(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in inner)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
