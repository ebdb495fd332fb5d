"""What a study does on a Dask worker: each of its tasks runs in a process that the worker starts for it.

Not in the worker itself: there, threads of one process would share the framework's random state, number of
threads and backend with each other and with other users' tasks, and could not be stopped.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import pickle
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from distributed import Status, Worker, get_worker

from batchnorm.files import write_whole
from batchnorm.version import __version__

from .data import Dataset
from .display import Display
from .errors import StudyError
from .frameworks import Framework, installed_versions
from .pool import WorkerPool
from .records import Run, Timing
from .settings import Recipe, Setting
from .user_code import is_user_code, source_of
from .worker import Task

_SECONDS_BETWEEN_REPORTS = 0.5  # of one task: a scheduler passes on those of all

# A result, and the steps that were taken for it; or an error's message, and the traceback behind it.
Answer = tuple[Literal["finished"], Run | Timing, int] | tuple[Literal["failed"], str, str]

S = TypeVar("S", Setting, Recipe)


class Parcel:
    """What a study's tasks share on a worker: its data, and processes that wait for the next task.

    A task of Dask makes it, so that Dask copies it to each worker that needs it, makes it again when the last
    copy is lost, and drops it when the study ends or its client dies. Its processes end with it.
    """

    def __init__(self, framework: Framework, data: Mapping[str, Dataset]) -> None:
        self.framework, self.data = framework, data
        self._idle: list[_Slot] = []
        weakref.finalize(self, _end, self._idle)

    def __reduce__(self) -> tuple[type[Parcel], tuple[Framework, Mapping[str, Dataset]]]:
        return Parcel, (self.framework, self.data)

    @functools.cached_property
    def folder(self) -> Path:
        """Where the user's files are written; it is deleted with this object."""
        folder = Path(tempfile.mkdtemp(prefix="batchnorm-study-", dir=get_worker().local_directory)).resolve()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    def take_slot(self) -> _Slot:
        """Returns a process that waits, or a new one."""
        try:
            return self._idle.pop()
        except IndexError:
            return _Slot(self.framework, self.data)

    def give_back(self, slot: _Slot) -> None:
        """Keeps a process for the next task."""
        self._idle.append(slot)


class _Slot(Display):
    """A process for one task at a time; its steps and deaths become events of Dask."""

    def __init__(self, framework: Framework, data: Mapping[str, Dataset]) -> None:
        self._pool = WorkerPool(1, data, framework, self, self._check)

    def do(self, task: Task, topic: str) -> tuple[Run | Timing, int]:
        """Returns a task's result and the steps that were taken; sends events with the key of Dask's task.

        Raises:
            StudyError: as `WorkerPool.run` does.
            _UnwantedError: the client has cancelled the task, or has died.
        """
        self._worker: Worker = get_worker()
        self._key = str(self._worker.get_current_task())
        self._topic, self._steps, self._last_report = topic, 0, time.monotonic()
        ((_, result),) = self._pool.run([task], {task: 1.0})
        return result, self._steps

    def end(self) -> None:
        self._pool.__exit__()

    def advance(self, work: float) -> None:
        self._steps += round(work)  # one per step
        if time.monotonic() - self._last_report > _SECONDS_BETWEEN_REPORTS:
            self._last_report = time.monotonic()
            self._tell("steps", self._steps)

    def notice(self, text: str) -> None:
        self._tell("notice", text)

    def _tell(self, kind: str, content: object) -> None:
        self._worker.log_event(self._topic, (self._key, kind, content))

    def _check(self) -> None:
        """Raises where nothing waits for the result any more: Dask itself never stops a task."""
        state = self._worker.state.tasks.get(self._key)
        is_closing = self._worker.status in (Status.closing, Status.closed, Status.failed)
        if state is None or state.state == "cancelled" or is_closing:
            raise _UnwantedError


class _UnwantedError(Exception):
    pass


def make_parcel(content: bytes) -> Parcel:
    """Returns the parcel of a pickled framework and data."""
    return Parcel(*pickle.loads(content))


def do(parcel: Parcel, topic: str, content: bytes) -> Answer:
    """Does a task on this worker, and sends its steps and notices as events meanwhile.

    Args:
        parcel: of the study.
        topic: of the events, `(key of Dask's task, "steps" or "notice", content)`; steps count from the
            task's beginning.
        content: the task, and the sources of the user's files by the places that it names, pickled.
    """
    task, sources = pickle.loads(content)
    paths = {place: _written(source, parcel.folder, place) for place, source in sources.items()}
    # Workers that Dask's nanny starts are daemons, which multiprocessing lets have no children. Those of a
    # pool are daemons too, so that they end with this process all the same.
    multiprocessing.current_process().daemon = False
    slot = parcel.take_slot()
    try:
        result, steps = slot.do(_with_files_at(task, paths), topic)
    except _UnwantedError:
        slot.end()
        return "failed", "cancelled", ""
    except StudyError as error:
        parcel.give_back(slot)
        return "failed", _as_at_home(str(error), paths), _as_at_home(error.details or "", paths)
    except BaseException:
        slot.end()
        raise
    parcel.give_back(slot)
    return "finished", result, steps


def differences(wanted: Mapping[str, str]) -> str:
    """Returns in words which packages have other versions here; nothing where none has."""
    here = dict(installed_versions(*wanted)) | {"batchnorm": __version__}
    return ", ".join(
        f"{package} {here[package]}, not {version}"
        for package, version in wanted.items()
        if here[package] != version
    )


def sources_of(task: Task) -> dict[str, bytes]:
    """Returns the content of the user's files that a worker needs for a task, by the places that it names."""
    records = (task.setting, task.recipe)
    specs = [value for record in records for value in _user_code_in(record).values()]
    places = [spec.rpartition(":")[0] for spec in specs]
    return {
        place: source.read_bytes()
        for place, spec in zip(places, specs, strict=True)
        if (source := source_of(spec)) is not None and place.endswith(".py") and source.is_file()
    }


def _user_code_in(record: Setting | Recipe) -> dict[str, str]:
    """Returns the fields that name functions of the user's; not `data`, which has been loaded."""
    return {
        name: value
        for name, value in vars(record).items()
        if name != "data" and isinstance(value, str) and is_user_code(value)
    }


def _written(source: bytes, folder: Path, place: str) -> Path:
    path = folder / hashlib.sha256(source).hexdigest()[:16] / Path(place).name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_whole(path, source)
    return path


def _with_files_at(task: Task, paths: Mapping[str, Path]) -> Task:
    """Returns a task that names the user's files at other places."""

    def moved(record: S) -> S:
        changes: dict[str, Any] = {}
        for name, spec in _user_code_in(record).items():
            place, _, function = spec.rpartition(":")
            if place in paths:
                changes[name] = f"{paths[place]}:{function}"
        return replace(record, **changes)

    return replace(task, setting=moved(task.setting), recipe=moved(task.recipe))


def _as_at_home(text: str, paths: Mapping[str, Path]) -> str:
    for place, path in paths.items():
        text = text.replace(str(path), place)
    return text


def _end(slots: Iterable[_Slot]) -> None:
    for slot in slots:
        slot.end()
