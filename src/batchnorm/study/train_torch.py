"""Train one network once in PyTorch, and record what happened."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm.models.calibrate import calibrate

from . import probes, timing
from .arms import Arm, parse_arm
from .data import Dataset
from .networks import build_network
from .run_form import ArmTiming, Run, TestTimeStatistics
from .run_record import PROBE_BATCH, TRAINING_SAMPLE, RunRecord
from .tasks import RunTask, TimingTask

_EVALUATION_BATCH = 500
_TARGET_BATCH = 250


@dataclass(frozen=True)
class TensorData:
    """A data set as tensors that share the arrays' memory."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    input_shape: tuple[int, ...]
    classes: int

    @classmethod
    def of(cls, data: Dataset) -> TensorData:
        return cls(
            torch.from_numpy(data.x_train),
            torch.from_numpy(data.y_train),
            torch.from_numpy(data.x_test),
            torch.from_numpy(data.y_test),
            data.input_shape,
            data.classes,
        )


class Learner:
    """A model with its optimizer (Adam) and its arm's penalties.

    The gradient of a penalty is added to the weights' gradients before the update, which is the same step as
    adding the penalty to the loss; the losses that are recorded are the cross-entropy alone, so that arms
    compare.
    """

    def __init__(self, model: nn.Module, arm: Arm, learning_rate: float) -> None:
        self.model = model
        self.layers = probes.weight_layers(model)
        self._arm = arm
        self._weights = [layer.weight for layer in self.layers.values() if isinstance(layer.weight, Tensor)]
        # Fused: a third less time per step of these small networks on a CPU.
        self._optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)

    def backward(self, x: Tensor, y: Tensor) -> float:
        """Compute the gradients of a batch's mean cross-entropy, and return it."""
        self._optimizer.zero_grad()
        loss = cross_entropy(self.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def update(self) -> None:
        """Take a step along the gradients and the penalties'."""
        with torch.no_grad():
            for weight in self._weights:
                if weight.grad is None:
                    continue
                if self._arm.l1:
                    weight.grad.add_(weight.sign(), alpha=self._arm.l1)
                if self._arm.l2:
                    weight.grad.add_(weight, alpha=2 * self._arm.l2)
        self._optimizer.step()


def train(task: RunTask, data: TensorData, report: Callable[[int], None]) -> Run:
    """Train once and return the run's record; the caller's random state is as before.

    Arms of one seed start from the same weights and see the same batches in the same order.

    Args:
        task: which run.
        data: its examples.
        report: called now and then with the number of steps taken since the last call.
    """
    with torch.random.fork_rng(devices=[]):
        arm = parse_arm(task.arm)
        model = build_network(task.network, arm, data.input_shape, data.classes, task.seed)
        torch.manual_seed(task.seed)
        return _Run(task, data, Learner(model, arm, task.learning_rate), report).complete()


def time_steps(task: TimingTask, data: TensorData) -> dict[str, ArmTiming]:
    """Time a training step of every arm of a network, in turns; the caller's random state is as before."""
    x, y = data.x_train[: task.batch_size], data.y_train[: task.batch_size]

    def step_of(arm: Arm) -> Callable[[], None]:
        model = build_network(task.network, arm, data.input_shape, data.classes, seed=0)
        learner = Learner(model, arm, learning_rate=1e-3)

        def step() -> None:
            learner.backward(x, y)
            learner.update()

        return step

    with torch.random.fork_rng(devices=[]):
        return timing.in_turns(task, step_of)


class _Run:
    def __init__(
        self, task: RunTask, data: TensorData, learner: Learner, report: Callable[[int], None]
    ) -> None:
        self.task, self.data, self.learner, self.model = task, data, learner, learner.model
        self.record = RunRecord(task, len(data.x_train), learner.layers, report)
        self.x_seen, self.y_seen = _fixed_sample(data)

    def complete(self) -> Run:
        data, size = self.data, self.task.batch_size
        self._check_output()
        # Cloned: a slice would share, and count, the storage of the whole data set.
        kept = probes.bytes_kept_for_backward(
            self.model, data.x_train[:size].clone(), data.y_train[:size].clone()
        )
        finished = self._train()
        return self.record.complete(
            finished=finished,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            bytes_kept=kept,
            test_time_statistics=self._test_time_statistics() if finished else None,
        )

    def _check_output(self) -> None:
        with torch.no_grad(), probes.batch_statistics(self.model):
            output = self.model(self.data.x_test[:2])
        wanted = (2, self.data.classes)
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape != wanted:
            raise ValueError(f"the network gives {shape} for two examples, not {wanted}")

    def _train(self) -> bool:
        """Train to the end, or until the loss is no longer finite; whether it stayed so."""
        for epoch in range(1, self.task.epochs + 1):
            self.model.train()
            for x, y in self._batches(epoch):
                if not self.record.add_loss(self.learner.backward(x, y)):
                    return False
                if self.record.probe_is_due:
                    self._probe()
                self.learner.update()
                self.record.end_step()
                if self.record.check_is_due:
                    self._check_target()
            if not self._record_epoch(epoch):
                return False
        return True

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(1_000_003 * self.task.seed + epoch)
        order = torch.randperm(len(self.data.x_train), generator=random)
        for number in range(self.record.steps_per_epoch):
            rows = order[number * self.task.batch_size : (number + 1) * self.task.batch_size]
            yield self.data.x_train.index_select(0, rows), self.data.y_train.index_select(0, rows)

    def _check_target(self) -> None:
        self.record.add_check(
            reaches(self.model, self.data.x_test, self.data.y_test, self.task.target_accuracy)
        )
        self.model.train()

    def _probe(self) -> None:
        self.record.add_probe(
            probes.gradient_norms(self.learner.layers),
            probes.input_spread(self.model, self.x_seen[:PROBE_BATCH]),
        )

    def _record_epoch(self, epoch: int) -> bool:
        return self.record.add_epoch(
            epoch,
            evaluate(self.model, self.x_seen, self.y_seen),
            evaluate(self.model, self.data.x_test, self.data.y_test),
        )

    def _test_time_statistics(self) -> TestTimeStatistics | None:
        if not probes.batch_norms(self.model):
            return None
        x, y = self.data.x_test, self.data.y_test
        calibrated = copy.deepcopy(self.model)
        calibrate(calibrated, _in_batches(_EVALUATION_BATCH, self.data.x_train, self.data.y_train))
        return {
            "batch": batch_statistics_accuracy(self.model, x, y, self.task.batch_size),
            "running": self.record.epochs[-1]["test_accuracy"],
            "calibrated": evaluate(calibrated, x, y)[1],
        }


def _fixed_sample(data: TensorData) -> tuple[Tensor, Tensor]:
    """Training examples that every run is evaluated on, in an order of their own."""
    size = min(len(data.x_test), TRAINING_SAMPLE)
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))[:size]
    return data.x_train.index_select(0, order), data.y_train.index_select(0, order)


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in evaluation mode, in which the model is left."""
    model.eval()
    loss, correct = 0.0, 0
    with torch.inference_mode():
        for inputs, classes in _in_batches(_EVALUATION_BATCH, x, y):
            output = model(inputs)
            loss += cross_entropy(output, classes, reduction="sum").item()
            correct += int((output.argmax(1) == classes).sum())
    return loss / len(x), correct / len(x)


def reaches(model: nn.Module, x: Tensor, y: Tensor, target: float) -> bool:
    """Whether accuracy in evaluation mode, in which the model is left, is at least `target`.

    Stops as soon as the errors rule it out: a network far below the target costs a fraction of the examples.
    """
    model.eval()
    wrong = 0
    with torch.inference_mode():
        for inputs, classes in _in_batches(_TARGET_BATCH, x, y):
            wrong += int((model(inputs).argmax(1) != classes).sum())
            if len(x) - wrong < target * len(x):
                return False
    return True


def batch_statistics_accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> float:
    """Accuracy where each batch is normalized by its own statistics, in batches of nearly `batch_size`."""
    correct = 0
    with torch.no_grad(), probes.batch_statistics(model):
        for inputs, classes in _in_batches(batch_size, x, y):
            correct += int((model(inputs).argmax(1) == classes).sum())
    return correct / len(x)


def _in_batches(size: int, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `size` or nearly so: equal parts rather than a small last one."""
    parts = math.ceil(len(x) / size)
    return zip(x.tensor_split(parts), y.tensor_split(parts), strict=True)
