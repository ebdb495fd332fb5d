"""Load a user's function from `package.module:function` or `file.py:function`, and blame the right line."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from batchnorm.errors import BatchNormError, OptionError

from .errors import StudyError


def is_user_code(spec: str) -> bool:
    """Whether a name points at a user's function: `file.py:function` or `package.module:function`."""
    place, colon, function = spec.rpartition(":")
    return bool(colon and place and function.isidentifier())


def source_of(spec: str) -> Path | None:
    """The user's source file that a spec names, or None for a module that has none."""
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place).resolve()
    with _importable(Path.cwd()):
        try:
            found = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            return None
    return Path(found.origin) if found and found.origin and Path(found.origin).is_file() else None


def load_function(spec: str) -> Callable[..., Any]:
    """Return the function that `spec` names; the file's folder, or the current one, is importable meanwhile.

    Raises:
        OptionError: there is no such file, module or function.
        StudyError: the file or module raised while it was imported.
    """
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise OptionError(f"{spec}: there is no file {place}")
        with _importable(path.parent), naming_the_line(f"importing {spec}", path):
            module = _module_from_file(path)
    else:
        with _importable(Path.cwd()):
            try:
                if importlib.util.find_spec(place) is None:
                    raise ModuleNotFoundError(f"No module named {place!r}")
            except (ImportError, ValueError) as missing:
                raise OptionError(f"{spec}: {missing}") from missing
            with naming_the_line(f"importing {spec}", source_of(spec)):
                module = importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise OptionError(f"{spec}: {place} has no function {name!r}")
    result: Callable[..., Any] = function
    return result


@contextlib.contextmanager
def naming_the_line(doing: str, source: Path | None = None) -> Iterator[None]:
    """Turn any exception into one line that says what was being done and which line of `source` raised."""
    try:
        yield
    except BatchNormError as ours:
        if isinstance(ours, StudyError):
            raise
        raise StudyError(f"{doing}: {_blame(ours, source)}", traceback.format_exc()) from ours
    except Exception as theirs:
        raise StudyError(f"{doing}: {_blame(theirs, source)}", traceback.format_exc()) from theirs


def _blame(error: Exception, source: Path | None) -> str:
    first_line = (str(error).strip() or "no message").splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if source is not None and Path(frame.filename) == source]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {first_line}{where}"


def _module_from_file(path: Path) -> ModuleType:
    name = f"batchnorm_study_user_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None, path
    assert found.loader is not None, path
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickles in the user's file look it up there
    found.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
