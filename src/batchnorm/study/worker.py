"""The worker process: takes tasks from a pipe, does them, and answers."""

from __future__ import annotations

import signal
from multiprocessing.connection import Connection

from .data import Dataset
from .errors import StudyError
from .tasks import RunTask, TimingTask
from .user_code import naming_the_line, source_of

Task = RunTask | TimingTask


def serve(connection: Connection) -> None:
    """Receive the data, then tasks, until the pipe closes.

    Answers are `("progress", steps)` any number of times, then `("finished", result)` or
    `("failed", message, traceback)`. Ctrl-C reaches the whole process group; here it is ignored, and the
    parent ends this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        data: Dataset = connection.recv()
        _Worker(connection, data).serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone, and nobody waits for an answer


class _Worker:
    def __init__(self, connection: Connection, data: Dataset) -> None:
        from . import train_torch

        self._connection = connection
        self._data = train_torch.TensorData.of(data)

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
        import torch

        from . import timing, train_torch

        # One thread each: these networks are too small to gain from more, workers share the cores, and on a
        # busy machine the threads of a short operation wait for each other a hundred times its length.
        torch.set_num_threads(1)
        if isinstance(task, TimingTask):
            return {"threads": torch.get_num_threads(), "arms": timing.measure(task, self._data)}
        return train_torch.train(task, self._data, lambda steps: self._connection.send(("progress", steps)))
