"""The worker process: takes tasks from a pipe, does them, and answers."""

from __future__ import annotations

import signal
from multiprocessing.connection import Connection

from .data import Dataset
from .engines import Engine, engine_for
from .errors import StudyError
from .frameworks import Framework
from .tasks import RunTask, TimingTask
from .user_code import naming_the_line, source_of

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

    def serve(self) -> None:
        while True:
            task: Task = self._connection.recv()
            try:
                with naming_the_line(task.describe(), source_of(task.network)):
                    result = self._do(task)
            except StudyError as error:
                self._connection.send(("failed", str(error), error.details))
            else:
                self._connection.send(("finished", result))

    def _do(self, task: Task) -> object:
        if isinstance(task, TimingTask):
            return self._engine.time(task)
        return self._engine.train(task, lambda steps: self._connection.send(("progress", steps)))
