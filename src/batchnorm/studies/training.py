"""Trains a network once, or times its steps: the same in every framework, over what a `Learner` does."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from .arms import Arm, parse_arm
from .data import Dataset
from .objectives import Metric, accuracy, metric_named, moved, targets_of
from .padding import Array, Examples, Padded
from .records import (
    NAN,
    AccuracyByStatistics,
    ArmTiming,
    Drift,
    Epoch,
    Gradients,
    Moments,
    Movement,
    Movements,
    Run,
    Timing,
)
from .settings import Recipe, Setting, display_name
from .tasks import RunTask, TimingTask
from .user_code import naming_the_line, source_of

EVALUATION_BATCH = 250
_TRAINING_SAMPLE = (
    1000  # training accuracy, near 1, needs no more; all of it would take a fifth of a run's time
)
_PROBE_BATCH = 128
_PROBES_PER_RUN = 24
_CHECKS_PER_EPOCH = 10
_STEPS_PER_REPORT = 25

MORE_PADDING = 0.2  # of the padded length
_MOVEMENT_BATCHES = 10  # a mean over some hundred examples needs no more
_RESOLVED = 1e-4  # sums over other lengths and batches round differently

_BLOCKS = 9
_STEPS_PER_BLOCK = 10
_WARM_UP_STEPS = 5
_SECONDS_PER_BLOCK = (
    0.05  # slow networks take fewer steps per block, so that timing stays a matter of seconds
)


class Learner(Protocol):
    """A network with its optimizer and its arm's penalties, in one framework.

    The gradient of a penalty is added to the weights' gradients before the update, which is the same step as
    adding the penalty to the loss; the losses that are recorded are without it, so that arms compare.

    Attributes:
        layers: names of the dense and convolution layers.
        parameters: how many numbers are trained.
        has_batch_norms: whether statistics at test time make a difference.
    """

    layers: Sequence[str]
    parameters: int
    has_batch_norms: bool

    def step(self, x: Examples, y: Array) -> float:
        """Takes a training step on a batch, and returns its mean loss before the step."""

    def gradient_norms(self) -> Sequence[float]:
        """Returns the norm of each layer's gradient in the last step, without penalties; NaN for none."""

    def predict(self, x: Examples, *, by_batch: bool = False) -> Array | str:
        """Returns float64 outputs `[N, ...]`, without dropout; or the name of the type that is no tensor.

        Batch normalizations use their running statistics, or with `by_batch` those of this batch.
        """

    def loss(self, outputs: Array, y: Array) -> float:
        """Returns the mean loss of such outputs."""

    def input_spread(self, x: Examples) -> Mapping[str, tuple[float, float]]:
        """Returns the mean and standard deviation of each layer's input over a batch.

        They are taken per unit (or channel) over the batch and positions, then averaged over units. Batch
        normalizations use the statistics of this batch, as in training; nothing is dropped. The network is
        as before.
        """

    def bytes_kept(self, x: Examples, y: Array) -> int | None:
        """Returns the bytes held between the forward and the backward of a step; None where none can tell.

        The input batch is counted, parameters are not. The network is as before.
        """

    def calibrate(self, x: Examples) -> None:
        """Sets the running statistics to those of all of `x`."""

    def freeze_statistics(self) -> None:
        """Makes batch normalizations use and keep their running statistics in training from now on."""

    def permutation(self, length: int, seed: int) -> Array:
        """Returns the numbers below `length`, shuffled: the same for the same seed, on every machine."""


# Builds the network of a setting for an arm, from a seed and with a learning rate; the last argument is
# whether gradient norms will be asked for.
MakeLearner = Callable[[Setting, Recipe, Arm, Dataset, int, float, bool], Learner]


def train(task: RunTask, data: Dataset, make: MakeLearner, report: Callable[[int], None]) -> Run:
    """Trains once and return the run's record.

    Arms of one seed start from the same weights and see the same batches in the same order.

    Args:
        task: which run.
        data: its examples.
        make: builds the network.
        report: called with numbers of steps taken, and at the end with those that are not: in all, the steps
            of a run.
    """
    arm = parse_arm(task.arm)
    learner = make(task.setting, task.recipe, arm, data, task.seed, task.learning_rate, True)
    return _Training(task, data, learner, report, arm.freeze_after).run()


def probe_steps(steps: int) -> set[int]:
    """Returns the steps of a run at which to look inside: 24 at most, closer together at the beginning."""
    last = _PROBES_PER_RUN - 1
    return {round((steps - 1) * (number / last) ** 2) for number in range(_PROBES_PER_RUN)}


class _Training:
    """One run: takes the steps, decides when to measure what, and keeps the measures."""

    def __init__(
        self,
        task: RunTask,
        data: Dataset,
        learner: Learner,
        report: Callable[[int], None],
        freeze_after: float | None = None,
    ) -> None:
        self.task, self.data, self.learner, self.report = task, data, learner, report
        self.batch_size = task.setting.batch_size
        self.steps_per_epoch = len(data.x_train) // self.batch_size
        self.total = self.steps_per_epoch * task.recipe.epochs
        # Before this step statistics are frozen; never for None.
        self.freeze_at = None if freeze_after is None else round(self.total * freeze_after)
        self.step = 0  # updates taken so far
        self.probe_at = probe_steps(self.total)
        self.check_every = self.next_check = math.ceil(self.steps_per_epoch / _CHECKS_PER_EPOCH)
        self.steps_to_target = NAN
        self.epochs: list[Epoch] = []
        self.losses: list[float] = []
        self.probed: list[int] = []  # at which steps
        self.gradients: dict[str, list[float]] = {name: [] for name in learner.layers}
        self.inputs: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in learner.layers}
        # Training examples that every run is evaluated on.
        sample = learner.permutation(len(data.x_train), 0)[: min(len(data.x_test), _TRAINING_SAMPLE)]
        self.seen = data.train[sample], data.y_train[sample]
        self.metric = metric_named(task.recipe.metric)

    def run(self) -> Run:
        """Trains to the end, or until the loss is no longer finite."""
        task, data, size = self.task, self.data, self.batch_size
        output = self.learner.predict(data.held_out[:2], by_batch=True)
        shape = output if isinstance(output, str) else output.shape
        kind = targets_of(task.recipe.loss)
        wanted = (2, data.outputs) if kind == "classes" else data.y_test[:2].shape
        if isinstance(shape, str) or (shape[:1] != (2,) if kind == "any" else shape != wanted):
            wanted_words = "a tensor of two" if kind == "any" else wanted
            raise ValueError(f"the network gives {shape} for two examples, not {wanted_words}")
        first = np.arange(size)  # copies: a slice would share, and count, the memory of the whole data set
        kept = self.learner.bytes_kept(data.train[first], data.y_train[first])
        finished = all(map(self._epoch, range(1, task.recipe.epochs + 1)))
        movements = self._movements() if finished else None
        self.report(self.total - self.step // _STEPS_PER_REPORT * _STEPS_PER_REPORT)
        return Run(
            data=data.name,
            network=display_name(task.setting.network),
            depth=task.setting.depth,
            arm=task.arm,
            learning_rate=task.learning_rate,
            seed=task.seed,
            status="finished" if finished else "diverged",
            epochs=self.epochs,
            step_loss=self.losses,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=size,
            target_accuracy=task.recipe.target_accuracy,
            steps_to_target=self.steps_to_target,
            target_checked_every=self.check_every,
            parameters=self.learner.parameters,
            bytes_kept_for_backward=NAN if kept is None else kept,
            gradient_norm=Gradients(self.probed, self.gradients),
            input_drift=Drift(self.probed, {name: Moments(*both) for name, both in self.inputs.items()}),
            movements=movements,
            test_time_statistics=self._test_time_statistics() if finished else None,
        )

    def _epoch(self, number: int) -> bool:
        """Trains for an epoch and evaluates; returns whether the losses stayed finite."""
        data, size = self.data, self.batch_size
        order = self.learner.permutation(len(data.x_train), 1_000_003 * self.task.seed + number)
        for start in range(0, self.steps_per_epoch * size, size):
            rows = order[start : start + size]
            if not self._step(data.train[rows], data.y_train[rows]):
                return False
        held_out = data.held_out, data.y_test
        losses = [
            value for part in (self.seen, held_out) for value in evaluate(self.learner, *part, self.metric)
        ]
        self.epochs.append(Epoch(number, *losses))
        return math.isfinite(losses[0]) and math.isfinite(losses[2])

    def _step(self, x: Examples, y: Array) -> bool:
        if self.step == self.freeze_at:
            self.learner.freeze_statistics()
        looks_inside = self.step in self.probe_at
        # Before the update: of the weights that the step's loss and gradients are of.
        spread = self.learner.input_spread(self.seen[0][:_PROBE_BATCH]) if looks_inside else {}
        self.losses.append(self.learner.step(x, y))
        if not math.isfinite(self.losses[-1]):
            return False
        if looks_inside:
            self.probed.append(self.step)
            for name, norm in zip(self.learner.layers, self.learner.gradient_norms(), strict=True):
                mean, std = spread.get(name, (NAN, NAN))
                self.gradients[name].append(norm)
                self.inputs[name][0].append(mean)
                self.inputs[name][1].append(std)
        self.step += 1
        if self.step % _STEPS_PER_REPORT == 0:
            self.report(_STEPS_PER_REPORT)
        if math.isnan(self.steps_to_target) and self.step >= self.next_check:
            self._check_target()
        return True

    def _check_target(self) -> None:
        """Looks up whether the target is reached; the next time is at most a tenth of the steps later."""
        later = self.step + max(self.check_every, self.step // 10)
        self.next_check = min(later, max(self.step + 1, self.total))
        target = self.task.recipe.target_accuracy
        if reaches(self.learner, self.data.held_out, self.data.y_test, target, self.metric):
            self.steps_to_target = self.step

    def _movements(self) -> Movements | None:
        """Serves held-out examples again, with other batch-mates and with more padding."""
        x, size = self.data.held_out, self.batch_size
        if not isinstance(x, Padded):
            return None
        x = x[self.learner.permutation(len(x), 1)[: _MOVEMENT_BATCHES * size]]
        order = self.learner.permutation(len(x), 2)
        takes_longer = self._takes_longer(x)

        def movement(*, by_batch: bool) -> Movement:
            def outputs(x: Examples) -> Array:
                return _outputs(self.learner, x, size, by_batch=by_batch)

            before = outputs(x)
            by_mates = self._moved(before[order], outputs(x[order]))
            if not takes_longer:
                return Movement(by_mates)
            return Movement(by_mates, self._moved(before, outputs(x.longer(MORE_PADDING))))

        return Movements(running=movement(by_batch=False), batch=movement(by_batch=True))

    def _takes_longer(self, x: Padded) -> bool:
        """Returns whether the network takes sequences of another length: one that flattens them does not."""
        try:
            self.learner.predict(x[:2].longer(MORE_PADDING))
        except Exception:  # whatever a network raises, in any framework: it took this length before
            return False
        return True

    def _moved(self, before: Array, after: Array) -> float:
        """Returns how far predictions moved; below what float32 resolves it is 0."""
        distance = moved(self.task.recipe.loss, before, after)
        return 0.0 if distance < _RESOLVED else distance

    def _test_time_statistics(self) -> AccuracyByStatistics | None:
        if not self.learner.has_batch_norms:
            return None
        x, y = self.data.held_out, self.data.y_test
        by_batch = self.metric(_outputs(self.learner, x, self.batch_size, by_batch=True), y)
        self.learner.calibrate(self.data.train)  # the last thing that is done with the network
        return AccuracyByStatistics(
            batch=by_batch,
            running=self.epochs[-1].test_accuracy,
            calibrated=evaluate(self.learner, x, y, self.metric)[1],
        )


def evaluate(learner: Learner, x: Examples, y: Array, metric: Metric = accuracy) -> tuple[float, float]:
    """Returns mean loss and metric, by running statistics and without dropout."""
    outputs = _outputs(learner, x, EVALUATION_BATCH)
    loss = learner.loss(outputs, y)
    # A diverged network has no accuracy; its outputs are not finite, which a metric need not bear.
    return loss, metric(outputs, y) if math.isfinite(loss) else NAN


def reaches(learner: Learner, x: Examples, y: Array, target: float, metric: Metric = accuracy) -> bool:
    """Returns whether the metric is at least `target`.

    Accuracy stops as soon as the errors rule it out: a network far below the target costs a fraction of the
    examples.
    """
    if metric is not accuracy:
        return evaluate(learner, x, y, metric)[1] >= target
    wrong = 0
    for rows, output in _batches(learner, x, EVALUATION_BATCH):
        wrong += int((output.argmax(axis=1) != y[rows]).sum())
        if len(x) - wrong < target * len(x):
            return False
    return True


def _outputs(learner: Learner, x: Examples, size: int, *, by_batch: bool = False) -> Array:
    """Returns outputs of all examples."""
    return np.concatenate([output for _, output in _batches(learner, x, size, by_batch=by_batch)])


def _batches(
    learner: Learner, x: Examples, size: int, *, by_batch: bool = False
) -> Iterator[tuple[Array, Array]]:
    """Yields rows and outputs in batches of nearly `size`: equal parts rather than a small last one."""
    for rows in np.array_split(np.arange(len(x)), math.ceil(len(x) / size)):
        output = learner.predict(x[rows], by_batch=by_batch)
        assert not isinstance(output, str)  # checked before training
        yield rows, output


def time_steps(task: TimingTask, data: Dataset, make: MakeLearner) -> Timing:
    """Times every arm of a setting, block by block.

    A step is forward, loss, backward and update, at the batch size of training. Arms take turns, so that
    other work of the machine falls on all of them; a block counts with its median step.
    """
    setting = task.setting
    x, y = data.train[: setting.batch_size], data.y_train[: setting.batch_size]
    learners: dict[str, Learner] = {}
    counts: dict[str, int] = {}
    for name in task.arms:
        with naming_the_line(f"network {setting.network_name}, arm {name}", source_of(setting.network)):
            learners[name] = make(setting, task.recipe, parse_arm(name), data, 0, 1e-3, False)
            slowest = _median_seconds(learners[name], x, y, _WARM_UP_STEPS)
        counts[name] = max(3, min(_STEPS_PER_BLOCK, int(_SECONDS_PER_BLOCK / slowest)))
    seconds: dict[str, list[float]] = {arm: [] for arm in task.arms}
    for _ in range(_BLOCKS):
        for name, learner in learners.items():
            seconds[name].append(_median_seconds(learner, x, y, counts[name]))
    held_out = data.held_out[:EVALUATION_BATCH]
    predictions = {
        name: _seconds(functools.partial(learner.predict, held_out)) for name, learner in learners.items()
    }
    kept = {name: learner.bytes_kept(x, y) for name, learner in learners.items()}
    return Timing(
        {
            name: ArmTiming(values, predictions[name], NAN if (size := kept[name]) is None else size)
            for name, values in seconds.items()
        }
    )


def _median_seconds(learner: Learner, x: Examples, y: Array, steps: int) -> float:
    return statistics.median(_seconds(lambda: learner.step(x, y)) for _ in range(steps))


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start
