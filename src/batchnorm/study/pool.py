"""Worker processes that share out tasks: none is orphaned, and none dies unnoticed."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Self

from .data import Dataset
from .errors import StudyError
from .frameworks import Framework
from .worker import Task, serve

_SECONDS_TO_END = 0.5
_ATTEMPTS = 2


@dataclass(frozen=True)
class Progress:
    """A task has taken some steps; negative where a dead worker's steps are to be taken again."""

    task: Task
    steps: int


@dataclass(frozen=True)
class Finished:
    """A task is done."""

    task: Task
    result: Any


@dataclass(frozen=True)
class Died:
    """A worker died on a task, which will be tried once more."""

    task: Task
    how: str


Event = Progress | Finished | Died


@dataclass
class _Member:
    process: SpawnProcess
    connection: Connection
    task: Task | None = None
    steps: int = 0


class WorkerPool:
    """Runs tasks in at most `size` processes, which start when needed and end with the `with` block.

    Processes are spawned, never forked: a fork of a process that has used torch's threads may hang.
    """

    def __init__(self, size: int, data: Dataset, framework: Framework) -> None:
        self._size = size
        self._data = data
        self._framework = framework
        self._context = multiprocessing.get_context("spawn")
        self._members: list[_Member] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with _interrupt_held():
            for member in self._members:
                member.process.terminate()
            for member in self._members:
                self._end(member)
            self._members.clear()

    def run(self, tasks: Sequence[Task]) -> Iterator[Event]:
        """Do tasks in any order, yielding what happens.

        Raises:
            StudyError: a task failed, or the worker on it died twice.
        """
        waiting = deque(tasks)
        attempts: dict[Task, int] = {}
        for member in self._start_up_to(min(self._size, len(waiting))):
            self._assign(member, waiting)
        while busy := [member for member in self._members if member.task is not None]:
            # The timeout lets Ctrl-C through where a platform's wait cannot be interrupted.
            ready = wait([member.connection for member in busy], timeout=0.5)
            for member in busy:
                if member.connection not in ready:
                    continue
                event = self._receive(member)
                if isinstance(event, Died):
                    attempts[event.task] = attempts.get(event.task, 1) + 1
                    if attempts[event.task] > _ATTEMPTS:
                        self._members.remove(member)
                        raise StudyError(
                            f"a worker process died again, {event.how}, on {event.task.describe()}"
                        )
                    if member.steps:
                        yield Progress(event.task, -member.steps)
                    waiting.append(event.task)
                    member = self._replace(member)
                yield event
                if member.task is None:
                    self._assign(member, waiting)

    def _start_up_to(self, wanted: int) -> list[_Member]:
        new = [self._start() for _ in range(wanted - len(self._members))]
        for member in new:
            self._hand_over_data(member)
        return self._members[:wanted]

    def _start(self) -> _Member:
        # It unblocks SIGINT when it starts itself, so it has to be there before.
        resource_tracker.ensure_running()
        with _interrupt_held():
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            member = _Member(process, ours)
            self._members.append(member)
        return member

    def _hand_over_data(self, member: _Member) -> None:
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # dead already: noticed when it is read
            member.connection.send((self._framework, self._data))

    def _replace(self, dead: _Member) -> _Member:
        self._members.remove(dead)
        member = self._start()
        self._hand_over_data(member)
        return member

    def _assign(self, member: _Member, waiting: deque[Task]) -> None:
        if waiting:
            member.task, member.steps = waiting.popleft(), 0
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                member.connection.send(member.task)

    def _receive(self, member: _Member) -> Event:
        task = member.task
        assert task is not None
        try:
            kind, *content = member.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):  # closed, or written to by the user's code
            return Died(task, self._end(member))
        if kind == "progress":
            member.steps += content[0]
            return Progress(task, content[0])
        member.task = None
        if kind == "failed":
            raise StudyError(*content)
        return Finished(task, content[0])

    def _end(self, member: _Member) -> str:
        """Make sure that a process is gone, and say how it went."""
        member.process.join(_SECONDS_TO_END)
        hangs = member.process.is_alive()
        if hangs:
            member.process.kill()
            member.process.join()
        member.connection.close()
        if hangs:
            return "no longer answering"
        code = member.process.exitcode or 0
        return (
            f"killed by signal {-code} ({signal.Signals(-code).name})"
            if code < 0
            else f"with exit code {code}"
        )


@contextlib.contextmanager
def _interrupt_held() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done; a process started inside never sees it.

    A process that starts inherits that the signal is blocked. Here that is not enough: a thread of a library,
    such as OpenBLAS's, takes the signal instead, and Python's handler then runs in the main thread.
    """
    with _handler_held():
        if not hasattr(signal, "pthread_sigmask"):
            yield
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _handler_held() -> Iterator[None]:
    """Call Python's handler of Ctrl-C after the block, where it was called for inside."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield  # no handler of Python's runs in this thread
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            signal.raise_signal(signal.SIGINT)
