"""Runs a study's tasks on the workers of a Dask cluster that the user has."""

from __future__ import annotations

import asyncio
import pickle
import platform
import queue
import threading
import time
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from batchnorm.errors import naming_the_extra
from batchnorm.version import __version__

from .data import Dataset
from .display import Display
from .errors import StudyError
from .frameworks import Framework
from .pool import interrupt_held
from .user_code import blame
from .worker import Task

if TYPE_CHECKING:
    from distributed import Client, Future

_SECONDS_TO_CONNECT = 8
_SECONDS_FOR_WORKERS = 10.0  # until the first one is there
_SECONDS_BETWEEN_LOOKS = 1.0  # at which workers there are
_SECONDS_TO_FETCH = 60  # a result from its worker, which may die meanwhile
_SECONDS_TO_CLOSE = 5


@dataclass
class _Placed:
    task: Task
    worker: str
    future: Future
    work_per_step: float
    steps: int = 0


class DaskPool:
    """Runs tasks on the workers of a Dask cluster; its scheduler is asked for when it is needed first.

    A worker does as many tasks at a time as it has threads, each in a process of its own (`cluster_worker`).
    A task is handed over when a worker has a thread free. Dask would queue it before, on one of the workers
    that have the data already, and workers that join later would get none. Workers may come and go.

    Args:
        address: of the scheduler, such as `tcp://host:8786`.
        jobs: how many tasks run at a time, at most; None for one per thread of the workers.
        data: what they train on, by name.
        framework: what they train in.
        display: receives progress and deaths.

    Raises:
        MissingExtraError: dask.distributed is not installed.
    """

    def __init__(
        self,
        address: str,
        jobs: int | None,
        data: Mapping[str, Dataset],
        framework: Framework,
        display: Display,
    ) -> None:
        with naming_the_extra("batchnorm study --executor"):
            import distributed  # noqa: F401
        self._address, self._jobs, self._display = address, jobs, display
        self._content = framework, data
        self._versions = {"batchnorm": __version__, **dict(framework.versions)}
        self._topic = f"batchnorm-study-{uuid.uuid4().hex}"
        self._connected: tuple[Client, Future] | None = None  # the future is of the parcel
        # From other threads: the key of a Dask task, "ended", "steps" or "notice", and what goes with it.
        self._inbox: queue.SimpleQueue[tuple[str, str, Any]] = queue.SimpleQueue()
        self._running: dict[str, _Placed] = {}
        self._lost: list[_Placed] = []  # with their workers
        self._threads: dict[str, int] = {}  # of the workers that can be used, by address
        self._refused: set[str] = set()
        self._looked = 0.0

    @property
    def size(self) -> int:
        """How many tasks run at a time, at most, on the workers that there are now."""
        self._connect()
        threads = sum(self._threads.values())
        return threads if self._jobs is None else min(self._jobs, threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with interrupt_held():
            self._cancel()
            if self._connected is not None:
                client, _ = self._connected
                self._connected = None  # the workers drop the parcel, and end its processes
                client.close(timeout=_SECONDS_TO_CLOSE)

    def run(
        self, tasks: Sequence[Task], work_per_step: Mapping[Task, float] | None = None
    ) -> Iterator[tuple[Task, Any]]:
        """Does tasks in any order, and yields each with its result; the display receives progress and deaths.

        A task whose worker dies or leaves is tried once more.

        Args:
            tasks: what is to be done.
            work_per_step: what the display hears of a task's step; nothing unless it is given.

        Raises:
            StudyError: a task failed, its worker died twice, or the cluster cannot be reached.
        """
        self._connect()
        waiting, died, work = deque(tasks), set[Task](), work_per_step or {}
        try:
            while waiting or self._running:
                self._look_for_workers()
                self._place(waiting, work)
                yield from self._receive()
                for lost in self._lost:
                    self._bury(lost, again=lost.task in died)
                    died.add(lost.task)
                    waiting.append(lost.task)
                self._lost.clear()
        finally:
            self._cancel()

    def _connect(self) -> None:
        if self._connected is not None:
            return
        from distributed import Client

        _check_that_a_scheduler_answers(self._address, _connection_args(self._address))
        # Ctrl-C is held, as a client that is interrupted while it is made cannot be closed.
        with (
            interrupt_held(),
            warnings.catch_warnings(action="ignore"),
        ):  # of versions: they are compared here
            client = Client(
                self._address, timeout=_SECONDS_TO_CONNECT, set_as_default=False, name="batchnorm-study"
            )
        with warnings.catch_warnings(action="ignore"):  # data are large for a task
            parcel = client.submit(_imported("make_parcel"), pickle.dumps(self._content), pure=False)
        self._connected = client, parcel
        client.subscribe_topic(self._topic, lambda event: self._inbox.put(event[1]))
        end = time.monotonic() + _SECONDS_FOR_WORKERS
        while not self._threads:
            if time.monotonic() > end:
                raise StudyError(
                    f"the Dask scheduler at {self._address} has no workers: start some with "
                    f"`dask worker {self._address}`"
                )
            self._look_for_workers(is_first=True)
            time.sleep(0.1)

    def _look_for_workers(self, *, is_first: bool = False) -> None:
        """Finds out, once a second, which workers there are; tasks of those that have left are lost."""
        if time.monotonic() - self._looked < _SECONDS_BETWEEN_LOOKS and not is_first:
            return
        assert self._connected is not None
        client, _ = self._connected
        try:
            threads = dict(client.nthreads()) if client.status == "running" else None
        except OSError:
            threads = None
        if threads is None:
            raise self._connection_lost()
        new = threads.keys() - self._threads.keys() - self._refused
        usable = self._threads.keys() | self._usable(sorted(new), is_first)
        if self._threads and not threads.keys() & usable:
            self._display.notice(f"no worker is left: start some with `dask worker {self._address}`")
        self._threads = {worker: count for worker, count in threads.items() if worker in usable}
        for key, placed in list(self._running.items()):
            if placed.worker not in self._threads:
                self._lose(key)
        self._looked = time.monotonic()

    def _usable(self, new: list[str], is_first: bool) -> set[str]:
        """Returns those of some new workers that have the versions of this process."""
        if not new:
            return set()
        assert self._connected is not None
        client, _ = self._connected
        usable = set()
        # Functions that are sent by value need the same Python; this one is sent by name.
        pythons = client.run(platform.python_version, workers=new, on_error="return")
        python = ".".join(platform.python_version_tuple()[:2])
        alike = [one for one in new if str(pythons.get(one)).startswith(f"{python}.")]
        found = client.run(_imported("differences"), self._versions, workers=alike, on_error="return")
        for worker in new:
            version, differences = pythons.get(worker), found.get(worker)
            if isinstance(version, OSError) or isinstance(differences, OSError):
                continue  # it has left meanwhile
            if isinstance(differences, BaseException):
                complaint = f"{blame(differences, None)}: pip install 'batchnorm[study,cluster]' there"
            elif worker not in alike:
                complaint = f"it runs Python {version}, not {python}"
            elif differences:
                complaint = f"it has {differences}: install the same versions there"
            else:
                usable.add(worker)
                continue
            if is_first:
                raise StudyError(f"worker {worker} cannot take part: {complaint}")
            self._refused.add(worker)
            self._display.notice(f"worker {worker} is left out: {complaint}")
        return usable

    def _place(self, waiting: deque[Task], work: Mapping[Task, float]) -> None:
        """Hands tasks to workers that have threads free, to those first that are least busy."""
        busy = Counter(placed.worker for placed in self._running.values())
        while waiting and len(self._running) < self.size:
            # The first of workers alike: one worker times a whole study, unless it leaves.
            worker = min(self._threads, key=lambda one: busy[one] / self._threads[one])
            if busy[worker] >= self._threads[worker]:
                break
            busy[worker] += 1
            task = waiting.popleft()
            self._submit(task, worker, work.get(task, 0.0))

    def _submit(self, task: Task, worker: str, work_per_step: float) -> None:
        from .cluster_worker import sources_of

        assert self._connected is not None
        client, parcel = self._connected
        key = f"batchnorm-run-{uuid.uuid4().hex}"
        content = pickle.dumps((task, sources_of(task)))
        future = client.submit(
            _imported("do"), parcel, self._topic, content, key=key, workers=[worker], pure=False
        )
        self._running[key] = _Placed(task, worker, future, work_per_step)
        future.add_done_callback(lambda _: self._inbox.put((key, "ended", None)))

    def _receive(self) -> Iterator[tuple[Task, Any]]:
        """Waits a moment for a message, and yields a task with its result if the message is that it ended."""
        try:
            key, kind, content = self._inbox.get(timeout=_SECONDS_BETWEEN_LOOKS)
        except queue.Empty:
            return
        placed = self._running.get(key)
        if placed is None:  # cancelled
            return
        if kind == "notice":
            self._display.notice(content)
        elif kind == "steps":
            self._show_steps(placed, content)
        elif (answer := self._answer(placed)) is None:
            self._lose(key)
        else:
            del self._running[key]
            if answer[0] == "failed":
                raise StudyError(*answer[1:])
            self._show_steps(placed, answer[2])
            yield placed.task, answer[1]

    def _answer(self, placed: _Placed) -> Any:
        """Returns the answer of a task that has ended; None where its worker has died."""
        from distributed import KilledWorker

        try:
            return placed.future.result(timeout=_SECONDS_TO_FETCH)
        except (TimeoutError, KilledWorker):
            return None
        except CancelledError:
            raise self._connection_lost() from None
        except Exception as error:
            doing = f"{placed.task.describe()}, on worker {placed.worker}"
            raise StudyError(f"{doing}: {blame(error, None)}") from error

    def _show_steps(self, placed: _Placed, steps: int) -> None:
        # Fewer than before where Dask itself has begun anew, on a worker that came back.
        self._display.advance((steps - placed.steps) * placed.work_per_step)
        placed.steps = steps

    def _lose(self, key: str) -> None:
        self._lost.append(self._running.pop(key))

    def _bury(self, lost: _Placed, *, again: bool) -> None:
        lost.future.cancel()
        who = f"worker {lost.worker}"
        if again:
            raise StudyError(f"a worker died or left again, {who}, on {lost.task.describe()}")
        self._show_steps(lost, 0)
        self._display.notice(f"{who} died or left, on {lost.task.describe()}; it is done again")

    def _connection_lost(self) -> StudyError:
        return StudyError(
            f"the Dask scheduler at {self._address} no longer answers; every finished run is kept, and the "
            "same command goes on from there"
        )

    def _cancel(self) -> None:
        """Has the workers stop what is going on."""
        futures = [placed.future for placed in (*self._running.values(), *self._lost)]
        self._running.clear()
        self._lost.clear()
        if futures and self._connected is not None:
            self._connected[0].cancel(futures, force=True)


def _imported(name: str) -> Callable[..., Any]:
    """Returns a function that imports that of `cluster_worker` where it is called.

    It is pickled by value, as it is a local one: the scheduler, which unpickles all tasks, needs no
    batchnorm, and a worker without it says so.
    """

    def call(*arguments: object) -> object:
        from batchnorm.studies import cluster_worker

        return getattr(cluster_worker, name)(*arguments)

    return call


def _connection_args(address: str) -> dict[str, Any]:
    """Returns how Dask's configuration connects; raises where the address asks for something else."""
    from distributed.security import Security

    security, where = Security(), "distributed.comm in Dask's configuration"
    try:
        arguments: dict[str, Any] = security.get_connection_args("client")
    except OSError as error:
        raise StudyError(f"{where} names TLS files that cannot be used: {_first_line(error)}") from error
    if address.startswith("tls:") and arguments.get("ssl_context") is None:
        raise StudyError(f"{address} needs a certificate: name its files at tls in {where}")
    if not address.startswith("tls:") and security.require_encryption:
        raise StudyError(f"{where} requires encryption: give the scheduler's address as tls://")
    return arguments


def _check_that_a_scheduler_answers(address: str, arguments: dict[str, Any]) -> None:
    """Raises where none does: a `Client` that fails or is interrupted meanwhile could not be closed.

    In a thread, as a loop may run in this one, as in notebooks; and one that Ctrl-C need not wait for.
    """
    from distributed.comm import connect

    async def shake_hands() -> None:
        comm = await connect(address, timeout=_SECONDS_TO_CONNECT, **arguments)
        await comm.close()

    def report() -> None:
        try:
            asyncio.run(shake_hands())
        except Exception as error:
            outcome.put(error)
        else:
            outcome.put(None)

    outcome: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    threading.Thread(target=report, daemon=True).start()
    error = outcome.get()
    if isinstance(error, OSError):
        start = f"start one with `dask scheduler`, or check the address ({_first_line(error)})"
        raise StudyError(f"no Dask scheduler answers at {address}: {start}") from error
    if error is not None:  # such as no memory for a message that would be that long
        raise StudyError(
            f"what answers at {address} is no Dask scheduler: the port of one is 8786 unless it was told "
            "another, and 8787 is its dashboard"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
