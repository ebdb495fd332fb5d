"""Loads a user's function from `package.module:function` or `file.py:function`, and names it in errors."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from batchnorm.errors import BatchNormError, OptionError, in_one_line

from .errors import StudyError


def is_user_code(spec: str) -> bool:
    """Returns whether a name points at a user's function: `file.py:function` or `package.module:function`."""
    place, colon, function = spec.rpartition(":")
    return bool(colon and place and function.isidentifier())


def source_of(spec: str) -> Path | None:
    """Returns the user's source file that a spec names, or None for a module that has none."""
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place).resolve()
    with _importable(Path.cwd()):
        try:
            found = importlib.util.find_spec(place)
        except (Exception, SystemExit):  # of the package around it; `load_function` says which
            return None
    return Path(found.origin) if found and found.origin and Path(found.origin).is_file() else None


def load_function(spec: str) -> Callable[..., Any]:
    """Returns the function that `spec` names; the file's folder, or the current one, is importable meanwhile.

    Raises:
        OptionError: there is no such file, module or function.
        StudyError: the file or module raised while it was imported.
    """
    place, _, name = spec.rpartition(":")
    path = source_of(spec)
    if place.endswith(".py"):
        if path is None or not path.is_file():
            raise OptionError(f"{spec}: there is no file {place}")
        with _importable(path.parent), naming_the_line(f"importing {spec}", path):
            module = _module_from_file(path)
    else:
        with _importable(Path.cwd()), naming_the_line(f"importing {spec}", path, kept=OptionError):
            try:
                if importlib.util.find_spec(place) is None:
                    raise ModuleNotFoundError(f"No module named {place!r}")
            except (ImportError, ValueError) as missing:
                raise OptionError(f"{spec}: {missing}") from missing
            module = importlib.import_module(place)
    with naming_the_line(f"importing {spec}", path):
        function = getattr(module, name, None)
    if not callable(function):
        raise OptionError(f"{spec}: {place} has no function {name!r}")
    result: Callable[..., Any] = function
    return result


@contextlib.contextmanager
def naming_the_line(
    doing: str, source: Path | None = None, kept: type[BatchNormError] = StudyError
) -> Iterator[None]:
    """Turns any exception into one line that says what was being done and which line of `source` raised.

    `sys.exit` of the user's code is one too: it would end a command with success and nothing done. Ctrl-C is
    not. A process that the user's code forked, and that comes back from it, ends here: it would go on with
    the work of its parent.

    Args:
        doing: what is being done.
        source: the user's file.
        kept: errors that are raised as they are.
    """
    process = os.getpid()
    try:
        yield
    except (kept, KeyboardInterrupt):
        raise
    except BaseException as theirs:
        if isinstance(theirs, SystemExit) and os.getpid() != process:
            os._exit(theirs.code if isinstance(theirs.code, int) else theirs.code is not None)
        raise StudyError(f"{doing}: {blame(theirs, source)}", traceback.format_exc()) from theirs
    finally:
        end_if_forked(process, doing)


def end_if_forked(process: int, doing: str) -> None:
    """Ends this process, with a line on stderr, unless it is the one of this number."""
    if os.getpid() != process:
        line = (
            f"{doing}: a process that it forked came back from it and is ended; end such a process by "
            "os._exit, or start it by subprocess"
        )
        os.write(2, f"{in_one_line(line)}\n".encode())
        os._exit(1)


def blame(error: BaseException, source: Path | None) -> str:
    """Returns an error's kind, the first line of its message, and the last line of `source` it passed."""
    try:
        first_line = (str(error).strip() or "no message").splitlines()[0]
    except Exception:  # of the user's own __str__
        first_line = "no message"
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
