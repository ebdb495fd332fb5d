"""Worker processes that share out tasks: none is orphaned, and none dies unnoticed.

A pool of our own, as others share a pipe or a queue among their workers: a worker that dies, or a user's
network that writes into it, breaks the pool (`concurrent.futures`, `loky`) or may (`pebble`). Here it costs
one task. Nor do they hold Ctrl-C back while a worker starts, or send progress.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol, Self

from .data import Dataset
from .display import Display
from .errors import StudyError
from .frameworks import Framework
from .worker import Task, serve

_SECONDS_TO_END = 0.5


@dataclass
class _Member:
    process: SpawnProcess
    connection: Connection
    task: Task | None = None
    work: float = 0.0


class Pool(Protocol):
    """Runs tasks, several at a time; what it started ends with the `with` block."""

    @property
    def size(self) -> int:
        """How many tasks run at a time, at most."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def run(
        self, tasks: Sequence[Task], work_per_step: Mapping[Task, float] | None = None
    ) -> Iterator[tuple[Task, Any]]:
        """Does tasks in any order, and yields each with its result; see `WorkerPool.run`."""


class WorkerPool:
    """Runs tasks in at most `size` processes, which start when needed and end with the `with` block.

    Processes are spawned, never forked: a fork of a process that has used torch's threads may hang.

    Args:
        size: how many processes, at most.
        data: what they train on, by name.
        framework: what they train in.
        display: receives steps and deaths.
        check: called at least every half second while tasks run; what it raises ends `run`.
    """

    def __init__(
        self,
        size: int,
        data: Mapping[str, Dataset],
        framework: Framework,
        display: Display,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.size = size
        self._data = data
        self._framework = framework
        self._display = display
        self._check = check
        self._context = multiprocessing.get_context("spawn")
        self._members: list[_Member] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with interrupt_held():
            for member in self._members:
                member.process.terminate()
            for member in self._members:
                self._end(member)
            self._members.clear()

    def run(
        self, tasks: Sequence[Task], work_per_step: Mapping[Task, float] | None = None
    ) -> Iterator[tuple[Task, Any]]:
        """Does tasks in any order, and yields each with its result; the display receives progress and deaths.

        A task whose worker dies is tried once more.

        Args:
            tasks: what is to be done.
            work_per_step: what the display hears of a task's step; nothing unless it is given.

        Raises:
            StudyError: a task failed, or the worker on it died twice.
        """
        waiting, died, work = deque(tasks), set[Task](), work_per_step or {}
        while len(self._members) < min(self.size, len(tasks)):
            self._start()
        for member in self._members:
            self._assign(member, waiting)
        while busy := [member for member in self._members if member.task is not None]:
            # The timeout lets Ctrl-C through where a platform's wait cannot be interrupted.
            ready = wait([member.connection for member in busy], timeout=0.5)
            self._check()
            for member in busy:
                if member.connection not in ready:
                    continue
                task = member.task
                assert task is not None
                try:
                    kind, *content = member.connection.recv()
                except (
                    EOFError,
                    OSError,
                    pickle.UnpicklingError,
                ):  # closed, or written to by the user's code
                    self._bury(member, task, again=task in died)
                    died.add(task)
                    waiting.append(task)
                    self._assign(self._start(), waiting)
                    continue
                if kind == "progress":
                    done = content[0] * work.get(task, 0.0)
                    member.work += done
                    self._display.advance(done)
                    continue
                member.task = None
                if kind == "failed":
                    raise StudyError(*content)
                yield task, content[0]
                self._assign(member, waiting)

    def _start(self) -> _Member:
        # It unblocks SIGINT when it starts itself, so it has to be there before.
        resource_tracker.ensure_running()
        with interrupt_held():
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            member = _Member(process, ours)
            self._members.append(member)
        self._send(member, (self._framework, self._data))
        return member

    def _assign(self, member: _Member, waiting: deque[Task]) -> None:
        if waiting:
            member.task, member.work = waiting.popleft(), 0.0
            self._send(member, member.task)

    def _send(self, member: _Member, message: object) -> None:
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # it is dead: noticed when it is read
            member.connection.send(message)

    def _bury(self, dead: _Member, task: Task, *, again: bool) -> None:
        self._members.remove(dead)
        how = f"{self._end(dead)}, on {task.describe()}"
        if again:
            raise StudyError(f"a worker process died again, {how}")
        self._display.advance(-dead.work)
        self._display.notice(f"a worker process died, {how}; it is done again")

    def _end(self, member: _Member) -> str:
        """Makes sure that a process is gone, and say how it went."""
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
def interrupt_held() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done; a process started inside never sees it.

    A process that starts inherits that the signal is blocked. Here that is not enough: a thread of a library,
    such as OpenBLAS's, takes the signal instead, and Python's handler then runs in the main thread. So that
    handler, too, waits for the end of the block.
    """
    can_block = hasattr(signal, "pthread_sigmask")
    handler = signal.getsignal(signal.SIGINT)
    # Elsewhere no handler of Python's runs.
    is_handled = threading.current_thread() is threading.main_thread() and handler is not None
    pressed: list[int] = []
    if is_handled:
        signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if can_block else ()
    try:
        yield
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if is_handled:
            signal.signal(signal.SIGINT, handler)
        if pressed:
            signal.raise_signal(signal.SIGINT)
