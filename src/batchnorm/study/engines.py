"""What does the work in a worker process: one engine per framework, which is imported when it is used."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from batchnorm.memory import reuse_memory

from .data import Dataset
from .errors import StudyError
from .frameworks import Framework
from .run_form import Run
from .tasks import RunTask, TimingTask

if TYPE_CHECKING:
    from .train_torch import TensorData


class Engine(Protocol):
    """Trains and times networks, on one thread."""

    def train(self, task: RunTask, report: Callable[[int], None]) -> Run:
        """Train once; the record, and meanwhile steps to `report`."""

    def time(self, task: TimingTask) -> dict[str, Any]:
        """Time the arms of a network: `{"threads": count, "arms": {arm: {"seconds_per_step": [...]}}}`."""


def engine_for(framework: Framework, data: Dataset) -> Engine:
    """The engine of a framework, for one data set."""
    return TorchEngine(data) if framework.backend is None else KerasEngine(data, framework.backend)


# One thread each: these networks are too small to gain from more, workers share the cores, and on a busy
# machine the threads of a short operation wait for each other a hundred times its length.


class TorchEngine:
    """PyTorch."""

    def __init__(self, data: Dataset) -> None:
        self._data = data
        self._tensors: TensorData | None = None

    def train(self, task: RunTask, report: Callable[[int], None]) -> Run:
        from . import train_torch

        return train_torch.train(task, self._prepared(), report)

    def time(self, task: TimingTask) -> dict[str, Any]:
        import torch

        from . import train_torch

        data = self._prepared()
        return {"threads": torch.get_num_threads(), "arms": train_torch.time_steps(task, data)}

    def _prepared(self) -> TensorData:
        import torch

        from . import train_torch

        torch.set_num_threads(1)
        if self._tensors is None:
            with warnings.catch_warnings(action="ignore"):  # where it cannot be had, the study does without
                reuse_memory()
            self._tensors = train_torch.TensorData.of(self._data)
        return self._tensors


class KerasEngine:
    """Keras on one of its backends, which is fixed for the life of the process."""

    def __init__(self, data: Dataset, backend: str) -> None:
        self._data = data
        self._backend = backend
        self._is_set_up = False

    def train(self, task: RunTask, report: Callable[[int], None]) -> Run:
        self._set_up()
        from . import train_keras

        return train_keras.train(task, self._data, report)

    def time(self, task: TimingTask) -> dict[str, Any]:
        self._set_up()
        from . import train_keras

        return {"threads": 1, "arms": train_keras.time_steps(task, self._data)}

    def _set_up(self) -> None:
        """Import Keras on the wanted backend, one thread and the CPU; what backends read, they read once."""
        if self._is_set_up:
            return
        os.environ.update(
            {
                "KERAS_BACKEND": self._backend,
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

            _ONE_THREAD[self._backend]()
            # On every backend it imports TensorFlow where that is installed, which greets on stderr and
            # cannot be told not to: the greeting would tear the progress bar.
            keras.utils.set_random_seed(0)
        if keras.config.backend() != self._backend:
            raise StudyError(
                f"Keras was imported on {keras.config.backend()} before the study could start it on "
                f"{self._backend}: set KERAS_BACKEND before the first import of Keras, or put what imports "
                "it under if __name__ == '__main__':"
            )
        # Keras would put "Exception encountered when calling ..." in front of what the user's layer says.
        keras.config.disable_traceback_filtering()
        self._is_set_up = True


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """Nothing is printed on stderr, by libraries in C++ either; what is raised is raised as ever."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _torch_on_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


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
    # What feeds `fit` has a greeting of its own, when it is used first.
    next(
        iter(tf.data.Dataset.from_generator(lambda: iter([0]), output_signature=tf.TensorSpec((), tf.int32)))
    )


_ONE_THREAD: dict[str, Callable[[], None]] = {
    "tensorflow": _tensorflow_on_one_thread,
    "torch": _torch_on_one_thread,
    "jax": lambda: None,  # by its environment, above
}
