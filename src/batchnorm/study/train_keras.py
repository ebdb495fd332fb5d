"""Train one network once in Keras, through `model.fit`, and record what happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from batchnorm.keras.calibrate import calibrate

from . import probes_keras as probes
from . import timing
from .arms import Arm, parse_arm
from .data import Dataset
from .networks_keras import build_network
from .optimizer_keras import make_adam
from .run_form import ArmTiming, Run, TestTimeStatistics
from .run_record import PROBE_BATCH, TRAINING_SAMPLE, RunRecord
from .tasks import RunTask, TimingTask

Array = npt.NDArray[Any]

# One size for all: XLA compiles even what is called eagerly once for each shape.
_EVALUATION_BATCH = 250


def train(task: RunTask, data: Dataset, report: Callable[[int], None]) -> Run:
    """Train once and return the run's record; Keras's session and the process's random state are the run's.

    Arms of one seed start from the same weights and see the same batches in the same order.

    Args:
        task: which run.
        data: its examples.
        report: called now and then with the number of steps taken since the last call.
    """
    keras.utils.clear_session()  # names of layers count from the beginning, and the last run's graphs go
    arm = parse_arm(task.arm)
    model = build_network(task.network, arm, data.input_shape, data.classes, task.seed)
    keras.utils.set_random_seed(task.seed)
    return _Run(task, data, model, arm, report).complete()


def time_steps(task: TimingTask, data: Dataset) -> dict[str, ArmTiming]:
    """Time `model.train_on_batch` of every arm of a network, in turns."""
    x, y = data.x_train[: task.batch_size], data.y_train[: task.batch_size].astype(np.int32)

    def step_of(arm: Arm) -> Callable[[], None]:
        model = build_network(task.network, arm, data.input_shape, data.classes, seed=0)
        model(x[:2], training=False)  # so that a network without an Input has its weights
        layers = probes.weight_layers(model).values()
        optimizer = make_adam(1e-3, arm, [probes.kernels(layer) for layer in layers], noting=False)
        model.compile(optimizer, _cross_entropy())

        def step() -> None:
            model.train_on_batch(x, y)

        return step

    return timing.in_turns(task, step_of)


class Batches(keras.utils.PyDataset):
    """All batches of a run, one epoch after the other.

    Each follows from its number alone: backends fetch them ahead, in threads of their own, where a data set
    that is shuffled at the end of an epoch would be shuffled at another moment on each.
    """

    def __init__(self, x: Array, y: Array, task: RunTask) -> None:
        super().__init__()
        self._x, self._y, self._task = x, y, task
        self._steps_per_epoch = len(x) // task.batch_size
        self._order: tuple[int, Array] = (0, np.empty(0, np.int64))

    @property
    def num_batches(self) -> int:
        return self._steps_per_epoch * self._task.epochs

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        epoch, number = divmod(index, self._steps_per_epoch)
        rows = self._shuffled(epoch + 1)[number * self._task.batch_size :][: self._task.batch_size]
        return self._x[rows], self._y[rows]

    def _shuffled(self, epoch: int) -> Array:
        kept, order = self._order
        if kept != epoch:
            # RandomState, because NumPy promises its stream for good.
            order = np.random.RandomState(1_000_003 * self._task.seed + epoch).permutation(len(self._x))
            self._order = (epoch, order)
        return order


class LastCrossEntropy(keras.metrics.Metric):
    """The mean cross-entropy of the last batch; Keras's own `loss` is the mean over the epoch so far."""

    def __init__(self) -> None:
        super().__init__(name="cross_entropy")
        self._last = self.add_variable((), initializer="zeros", name="last")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        del sample_weight
        self._last.assign(_cross_entropy()(y_true, y_pred))

    def result(self) -> Any:
        return keras.ops.convert_to_tensor(self._last)


class _Run:
    def __init__(
        self, task: RunTask, data: Dataset, model: keras.Model, arm: Arm, report: Callable[[int], None]
    ) -> None:
        self.task, self.data, self.model, self.arm = task, data, model, arm
        self._check_output()
        self.layers = probes.weight_layers(model)
        self.record = RunRecord(task, len(data.x_train), self.layers, report)
        self.y_train = data.y_train.astype(np.int32)  # the widest that JAX has
        self.seen = _fixed_sample(data)

    def complete(self) -> Run:
        size = self.task.batch_size
        kept = probes.bytes_kept_for_backward(
            self.model, self.data.x_train[:size].copy(), self.y_train[:size].copy(), _cross_entropy()
        )
        finished = self._train()
        return self.record.complete(
            finished=finished,
            parameters=sum(math.prod(variable.shape) for variable in self.model.trainable_variables),
            bytes_kept=kept,
            test_time_statistics=self._test_time_statistics() if finished else None,
        )

    def _check_output(self) -> None:
        with probes.batch_statistics(self.model):
            output = self.model(self.data.x_test[:2], training=False)
        wanted = (2, self.data.classes)
        shape = tuple(output.shape) if keras.ops.is_tensor(output) else type(output).__name__
        if shape != wanted:
            raise ValueError(f"the network gives {shape} for two examples, not {wanted}")

    def _train(self) -> bool:
        """Train to the end, or until the loss is no longer finite; whether it stayed so."""
        kernels = [probes.kernels(layer) for layer in self.layers.values()]
        optimizer = make_adam(self.task.learning_rate, self.arm, kernels, noting=True)
        self.model.compile(optimizer, _cross_entropy(), metrics=[LastCrossEntropy()])
        watcher = _Watcher(self)
        self.model.fit(
            Batches(self.data.x_train, self.y_train, self.task),
            epochs=self.task.epochs,
            steps_per_epoch=self.record.steps_per_epoch,
            shuffle=False,  # it would shuffle the batches of all epochs together
            callbacks=[watcher],
            verbose=0,
        )
        return watcher.is_finite

    def gradient_norms(self) -> dict[str, float]:
        norms = keras.ops.convert_to_numpy(self.model.optimizer.gradient_norms)
        return dict(zip(self.layers, map(float, norms), strict=True))

    def input_spread(self) -> dict[str, tuple[float, float]]:
        return probes.input_spread(self.model, self.seen[0][:PROBE_BATCH])

    def check_target(self) -> None:
        self.record.add_check(
            reaches(self.model, self.data.x_test, self.data.y_test, self.task.target_accuracy)
        )

    def record_epoch(self, epoch: int) -> bool:
        return self.record.add_epoch(
            epoch,
            evaluate(self.model, *self.seen),
            evaluate(self.model, self.data.x_test, self.data.y_test),
        )

    def _test_time_statistics(self) -> TestTimeStatistics | None:
        if not probes.batch_norms(self.model):
            return None
        x, y = self.data.x_test, self.data.y_test
        with probes.state_kept(self.model):
            calibrate(self.model, self.data.x_train, batch_size=_EVALUATION_BATCH, verbose=0)
            calibrated = evaluate(self.model, x, y)[1]
        return {
            "batch": batch_statistics_accuracy(self.model, x, y, self.task.batch_size),
            "running": self.record.epochs[-1]["test_accuracy"],
            "calibrated": calibrated,
        }


class _Watcher(keras.callbacks.Callback):
    """Records a run from inside of `fit`."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self._run = run
        self._spread: dict[str, tuple[float, float]] | None = None
        self.is_finite = True

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        if self._run.record.probe_is_due:  # before the update: the weights that the step's loss is of
            self._let_read()
            self._spread = self._run.input_spread()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del batch
        record = self._run.record
        if not record.add_loss(float(logs["cross_entropy"])):
            self._stop()
            return
        if self._spread is not None:
            self._let_read()
            record.add_probe(self._run.gradient_norms(), self._spread)
            self._spread = None
        record.end_step()
        if record.check_is_due:
            self._let_read()
            self._run.check_target()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del logs
        if self.is_finite and not self._run.record_epoch(epoch + 1):
            self._stop()

    def _stop(self) -> None:
        self.is_finite = False
        self.model.stop_training = True

    def _let_read(self) -> None:
        """Put the values of `fit` into the model's variables: on JAX it keeps them to itself for an epoch."""
        if keras.config.backend() == "jax":
            self.model.jax_state_sync()


def _cross_entropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _fixed_sample(data: Dataset) -> tuple[Array, Array]:
    """Training examples that every run is evaluated on, in an order of their own."""
    size = min(len(data.x_test), TRAINING_SAMPLE)
    rows = np.random.RandomState(0).permutation(len(data.x_train))[:size]
    return data.x_train[rows], data.y_train[rows]


def _logits(model: keras.Model, x: Array) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(model(x, training=False)), np.float64)


def evaluate(model: keras.Model, x: Array, y: Array) -> tuple[float, float]:
    """Mean cross-entropy and accuracy at inference."""
    loss, correct = 0.0, 0
    for inputs, classes in _in_batches(_EVALUATION_BATCH, x, y):
        output = _logits(model, inputs)
        with np.errstate(invalid="ignore"):  # a diverged network's outputs are infinite, and its loss is NaN
            shifted = output - output.max(axis=1, keepdims=True)
            of_class = shifted[np.arange(len(classes)), classes]
            loss += float(np.sum(np.log(np.exp(shifted).sum(axis=1)) - of_class))
        correct += int((output.argmax(axis=1) == classes).sum())
    return loss / len(x), correct / len(x)


def reaches(model: keras.Model, x: Array, y: Array, target: float) -> bool:
    """Whether accuracy at inference is at least `target`.

    Stops as soon as the errors rule it out: a network far below the target costs a fraction of the examples.
    """
    wrong = 0
    for inputs, classes in _in_batches(_EVALUATION_BATCH, x, y):
        wrong += int((_logits(model, inputs).argmax(axis=1) != classes).sum())
        if len(x) - wrong < target * len(x):
            return False
    return True


def batch_statistics_accuracy(model: keras.Model, x: Array, y: Array, batch_size: int) -> float:
    """Accuracy where each batch is normalized by its own statistics, in batches of nearly `batch_size`."""
    correct = 0
    with probes.batch_statistics(model):
        for inputs, classes in _in_batches(batch_size, x, y):
            correct += int((_logits(model, inputs).argmax(axis=1) == classes).sum())
    return correct / len(x)


def _in_batches(size: int, x: Array, y: Array) -> Iterator[tuple[Array, Array]]:
    """Batches of `size` or nearly so: equal parts rather than a small last one."""
    parts = math.ceil(len(x) / size)
    return zip(np.array_split(x, parts), np.array_split(y, parts), strict=True)
