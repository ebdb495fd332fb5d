"""JSON files of dataclasses: written, read and checked by their fields; nothing in a file is trusted."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from batchnorm.errors import DataError
from batchnorm.files import read_within, write_whole

T = TypeVar("T")

# A run that leaves more has taken some ten million steps.
MOST_OF_A_RUN = 2**28
MOST_OF_A_STUDY = 2**32
_DEEPEST = 20  # levels of lists and objects; what a study writes has six
# No measure of a run comes near: it is far beyond float32, and the square of it is still a number.
_LARGEST = 1e100

_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


def write_json(path: Path, value: object) -> None:
    """Writes a value as standard JSON; see `json_safe`."""
    write_whole(path, json.dumps(json_safe(value), allow_nan=False) + "\n")


def json_safe(value: object) -> object:
    """Returns a value with dataclasses as dicts, and None for every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


def read_json(path: Path, most: int) -> object:
    """Returns what a file of JSON holds.

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


def settings_at(path: Path) -> dict[str, object] | None:
    """Returns the settings that the file at `path` was made with; None where no readable file has any."""
    record = _read_record(path)
    return None if record is None else record["settings"]


def read_stored(path: Path, settings: Mapping[str, object], form: type[T]) -> T | None:
    """Returns what stands beside the settings in a file; None where it is missing or damaged.

    Args:
        path: of the file.
        settings: with which it must have been made.
        form: a dataclass, whose fields the file must have, and no others.

    Raises:
        DataError: the file was made with other settings, so that going on would mix two studies.
    """
    record = _read_record(path)
    if record is None:
        return None
    stored: dict[str, object] = record.pop("settings")
    differences = [
        f"{key if key in settings else _SHORT.repr(key)} {_SHORT.repr(stored.get(key))} "
        f"(now {_SHORT.repr(settings.get(key))})"
        for key in {**settings, **stored}
        if json_safe(settings.get(key)) != stored.get(key)
    ]
    if differences:
        raise DataError(
            f"{path} was made with other settings, {', '.join(differences[:8])}: "
            "name another folder with --out, or delete this one"
        )
    try:
        return convert(record, form, exact=True)
    except DataError:
        return None


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = read_json(path, MOST_OF_A_RUN)
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("settings"), dict) else None


def convert(value: object, form: type[T], *, exact: bool) -> T:
    """Returns a value from JSON as the dataclass `form`, whatever lists and objects are within it.

    A number has to be finite and at most 1e100 in size.

    Args:
        value: of dicts, lists, strings, numbers and None.
        form: a dataclass. Its fields are numbers, strings, Literals, Sequences, Mappings with keys of
            strings, unions with None, `object`, and dataclasses of these.
        exact: whether objects must have just the fields of their dataclass. Otherwise other fields are left
            out, a missing field is as null, a field that is null has its default if there is one, and a
            number that is too large is NaN.

    Raises:
        DataError: with the place of what does not fit, such as `runs[0].seed`.
    """
    try:
        return typing.cast(T, _converter(typing.cast(Any, form), exact)(value))
    except _MisfitError as misfit:
        raise DataError(f"{misfit.place.lstrip('.') or 'the top level'} {misfit}") from None


class _MisfitError(Exception):
    place = ""


Converter = Callable[[Any], Any]


@functools.cache
def _converter(form: Any, exact: bool) -> Converter:
    """Makes the converter of a form once: a study's files hold millions of numbers."""
    origin, inner = typing.get_origin(form), typing.get_args(form)
    if dataclasses.is_dataclass(form):
        return functools.partial(_fields, form, exact)
    if origin in (Sequence, Mapping, types.UnionType, Annotated):
        one = _converter(inner[origin is Mapping], exact)
        if origin is Sequence:
            return lambda value: [_within(f"[{i}]", one, item) for i, item in enumerate(_a(list, value))]
        if origin is Mapping:
            return lambda value: {key: _within(f".{key}", one, item) for key, item in _a(dict, value).items()}
        missing = math.nan if origin is Annotated else None
        return lambda value: missing if value is None else one(value)
    if origin is Literal:
        return lambda value: value if value in inner else _misfit(value, " or ".join(inner))
    if form is float or form is int:
        return functools.partial(_number, form, exact)
    return functools.partial(_a, form)


def _fields(form: Any, exact: bool, value: object) -> object:
    found, fields, types_ = _a(dict, value), dataclasses.fields(form), _types_of(form)
    if exact and found.keys() != types_.keys():
        raise _MisfitError(f"has other fields than {', '.join(types_)}")
    content = {}
    for field in fields:
        item = found.get(field.name)
        is_optional = not (field.default is field.default_factory is dataclasses.MISSING)
        if exact or item is not None or not is_optional:
            content[field.name] = _within(f".{field.name}", _converter(types_[field.name], exact), item)
    try:
        return form(**content)
    except ValueError as error:
        raise _MisfitError(str(error)) from None


@functools.cache
def _types_of(form: Any) -> dict[str, Any]:
    return typing.get_type_hints(form, include_extras=True)


def _within(place: str, converter: Converter, value: object) -> Any:
    try:
        return converter(value)
    except _MisfitError as misfit:
        misfit.place = (place if len(place) <= 80 else f"{place[:77]}...") + misfit.place
        raise


_CALLED: dict[type, str] = {dict: "an object", list: "a list", str: "a name"}


def _a(kind: type, value: object) -> Any:
    return value if isinstance(value, kind) else _misfit(value, _CALLED[kind])


def _number(form: type, exact: bool, value: object) -> float:
    if type(value) is not int and (form is int or type(value) is not float):
        _misfit(value, "a number")
    number = typing.cast(float, value)
    if abs(number) <= _LARGEST:
        return number
    return _misfit(value, "a number of no more than 1e100") if exact or form is int else math.nan


def _misfit(value: object, wanted: str) -> NoReturn:
    text = reprlib.repr(value)
    shown = "missing" if value is None else text if len(text) <= 40 else f"{text[:37]}..."
    raise _MisfitError(f"is {shown}, {wanted} is needed")


def _is_shallow(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in inner)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
