"""A study's files: written whole or not at all, and read back only if they belong to the study asked for."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from batchnorm.errors import DataError

Record = dict[str, Any]


def write_whole(path: Path, content: str) -> None:
    """Write a file that is there in full or not at all, whatever interrupts: power, Ctrl-C or a full disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


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


def read_finished(path: Path, settings: dict[str, object]) -> Record | None:
    """The record at `path`, or None where there is none, or none that can be read.

    Args:
        path: a run's file.
        settings: what the record must have been made with.

    Raises:
        DataError: the record was made with other settings, so that going on would mix two studies.
    """
    record = _read_record(path)
    if record is None:
        return None
    stored = record["settings"]
    differences = [
        f"{key} {stored.get(key)} (now {settings.get(key)})"
        for key in settings | stored
        if json_safe(settings.get(key)) != stored.get(key)
    ]
    if differences:
        raise DataError(
            f"{path} was made with other settings, {', '.join(differences)}: "
            "name another folder with --out, or delete this one"
        )
    return record


def read_if_same(path: Path, settings: object) -> Record | None:
    """The record at `path` if it was made with exactly these settings; None otherwise."""
    record = _read_record(path)
    return record if record is not None and record["settings"] == json_safe(settings) else None


def _read_record(path: Path) -> Record | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("settings"), dict) else None
