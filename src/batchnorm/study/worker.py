"""The worker process: takes tasks from a pipe, does them, and answers."""

from __future__ import annotations

import os
import signal
import traceback
from multiprocessing.connection import Connection

from .data import Dataset
from .engines import Engine, engine_for
from .errors import StudyError
from .frameworks import Framework
from .tasks import RunTask, TimingTask
from .user_code import blame, end_if_forked, naming_the_line, source_of

Task = RunTask | TimingTask


def serve(connection: Connection) -> None:
    """Receive the framework and the data, then tasks, until the pipe closes.

    Answers are `("progress", steps)` any number of times, then `("finished", result)` or
    `("failed", message, traceback)`. Ctrl-C reaches the whole process group; here it is ignored, and the
    parent ends this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        framework: Framework
        data: Dataset
        framework, data = connection.recv()
        _Worker(connection, engine_for(framework, data)).serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone, and nobody waits for an answer


class _Worker:
    def __init__(self, connection: Connection, engine: Engine) -> None:
        self._connection = connection
        self._engine = engine
        self._process = os.getpid()

    def serve(self) -> None:
        while True:
            task: Task = self._connection.recv()
            doing, source = task.describe(), source_of(task.network)
            try:
                with naming_the_line(doing, source):
                    result = self._do(task)
            except StudyError as error:
                self._answer(doing, "failed", str(error), error.details)
            except KeyboardInterrupt as theirs:  # Ctrl-C is ignored here: it is one that the network raises
                self._answer(doing, "failed", f"{doing}: {blame(theirs, source)}", traceback.format_exc())
            else:
                self._answer(doing, "finished", result)

    def _do(self, task: Task) -> object:
        if isinstance(task, TimingTask):
            return self._engine.time(task)
        return self._engine.train(task, lambda steps: self._answer(task.describe(), "progress", steps))

    def _answer(self, doing: str, *message: object) -> None:
        end_if_forked(self._process, doing)  # two processes on one pipe would garble it
        self._connection.send(message)
