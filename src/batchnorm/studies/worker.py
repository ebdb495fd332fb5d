"""The worker process: takes tasks from a pipe, does them on one thread, and answers."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

from batchnorm.allocator import reuse_memory

from . import training
from .data import Dataset
from .errors import StudyError
from .frameworks import Framework
from .records import Run, Timing
from .tasks import RunTask, TimingTask
from .user_code import blame, end_if_forked, naming_the_line, source_of

Task = RunTask | TimingTask


def serve(connection: Connection) -> None:
    """Receives the framework and the data, then tasks, until the pipe closes.

    Answers are `("progress", steps)` any number of times, then `("finished", result)` or
    `("failed", message, traceback)`. Ctrl-C reaches the whole process group; here it is ignored, and the
    parent ends this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = os.getpid()

    def answer(doing: str, *message: object) -> None:
        end_if_forked(process, doing)  # two processes on one pipe would garble it
        connection.send(message)

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has ended
        engine = Engine(*connection.recv())
        while True:
            task: Task = connection.recv()
            doing, source = task.describe(), source_of(task.setting.network)
            try:
                with naming_the_line(doing, source):
                    result = engine.do(task, functools.partial(answer, doing, "progress"))
            except StudyError as error:
                answer(doing, "failed", str(error), error.details)
            except KeyboardInterrupt as theirs:  # Ctrl-C is ignored here: it is one that the network raises
                answer(doing, "failed", f"{doing}: {blame(theirs, source)}", traceback.format_exc())
            else:
                answer(doing, "finished", result)


class Engine:
    """Trains and times networks in a framework, which is imported when it is used.

    On one thread: these networks are too small to gain from more, workers share the cores, and on a busy
    machine the threads of a short operation wait for each other a hundred times its length.
    """

    def __init__(self, framework: Framework, data: Mapping[str, Dataset]) -> None:
        self._framework, self._data = framework, data

    def do(self, task: Task, report: Callable[[int], None]) -> Run | Timing:
        """Returns the record of a run or the timing of a setting's arms; steps go to `report` meanwhile."""
        with self._learners.session():
            make: training.MakeLearner = self._learners.make_learner
            data = self._data[task.setting.data]
            if isinstance(task, TimingTask):
                return training.time_steps(task, data, make)
            return training.train(task, data, make, report)

    @functools.cached_property
    def _learners(self) -> ModuleType:
        if self._framework.backend is None:
            _set_up_torch()
            from . import learner_torch

            return learner_torch
        _set_up_keras(self._framework.backend)
        from . import learner_keras

        return learner_keras


def _set_up_torch() -> None:
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings(action="ignore"):  # a study needs no `reuse_memory`
        reuse_memory()


def _set_up_keras(backend: str) -> None:
    """Imports Keras on a backend, one thread and the CPU: settings that backends read once."""
    os.environ.update(
        {
            "KERAS_BACKEND": backend,
            "CUDA_VISIBLE_DEVICES": "-1",
            "JAX_PLATFORMS": "cpu",
            "KERAS_TORCH_DEVICE": "cpu",
            # JAX has no option for the size of its pool of threads; its CPU client takes it from here.
            "PJRT_NPROC": "1",
            "NPROC": "1",
        }
    )
    with _stderr_closed():
        import keras

        if backend == "tensorflow":
            _tensorflow_on_one_thread()
        elif backend == "torch":
            _set_up_torch()
        # On every backend it imports TensorFlow where that is installed, which greets on stderr and
        # cannot be told not to: the greeting would tear the progress bar.
        keras.utils.set_random_seed(0)
    if keras.config.backend() != backend:
        raise StudyError(
            f"Keras was imported on {keras.config.backend()} before the study could start it on "
            f"{backend}: set KERAS_BACKEND before the first import of Keras, or put what imports "
            "it under if __name__ == '__main__':"
        )
    # Keras would put "Exception encountered when calling ..." in front of what the user's layer says.
    keras.config.disable_traceback_filtering()


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """Discards stderr, also what libraries in C++ write to it; exceptions pass."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _tensorflow_on_one_thread() -> None:
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError as error:
        raise StudyError(
            "TensorFlow was running before the study could give it one thread: put what uses it under "
            "if __name__ == '__main__':"
        ) from error
