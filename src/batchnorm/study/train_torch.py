"""Train one network once in PyTorch, and record what happened."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm.models.calibrate import calibrate

from . import probes
from .arms import Arm, parse_arm
from .data import Dataset
from .networks import build_network
from .options import display_name
from .tasks import RunTask

_EVALUATION_BATCH = 500
_TARGET_BATCH = 250
_TRAINING_SAMPLE = 1000
_PROBE_BATCH = 128
_CHECKS_PER_EPOCH = 10
_STEPS_PER_REPORT = 25


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


def train(task: RunTask, data: TensorData, report: Callable[[int], None]) -> dict[str, Any]:
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
        return _Run(task, data, Learner(model, arm, task.learning_rate)).complete(report)


class _Run:
    def __init__(self, task: RunTask, data: TensorData, learner: Learner) -> None:
        self.task, self.data, self.learner, self.model = task, data, learner, learner.model
        self.steps_per_epoch = len(data.x_train) // task.batch_size
        self.x_seen, self.y_seen = _fixed_sample(data)
        self.check_every = math.ceil(self.steps_per_epoch / _CHECKS_PER_EPOCH)
        self.next_check = self.check_every
        self.probe_at = probes.probe_steps(self.steps_per_epoch * task.epochs)
        self.step_loss: list[float] = []
        self.epochs: list[dict[str, float]] = []
        self.steps_to_target: int | None = None
        self.probed: list[int] = []
        self.gradients: dict[str, list[float]] = {name: [] for name in learner.layers}
        self.means: dict[str, list[float]] = {name: [] for name in learner.layers}
        self.stds: dict[str, list[float]] = {name: [] for name in learner.layers}

    def complete(self, report: Callable[[int], None]) -> dict[str, Any]:
        data, size = self.data, self.task.batch_size
        self._check_output()
        # Cloned: a slice would share, and count, the storage of the whole data set.
        kept = probes.bytes_kept_for_backward(
            self.model, data.x_train[:size].clone(), data.y_train[:size].clone()
        )
        finished = self._train(report)
        record: dict[str, Any] = {
            "network": display_name(self.task.network),
            "arm": self.task.arm,
            "learning_rate": self.task.learning_rate,
            "seed": self.task.seed,
            "status": "finished" if finished else "diverged",
            "epochs": self.epochs,
            "step_loss": self.step_loss,
            "steps_per_epoch": self.steps_per_epoch,
            "batch_size": size,
            "target_accuracy": self.task.target_accuracy,
            "steps_to_target": self.steps_to_target,
            "target_checked_every": self.check_every,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "bytes_kept_for_backward": kept,
            "gradient_norm": {"steps": self.probed, "layers": self.gradients},
            "input_drift": {
                "steps": self.probed,
                "layers": {name: {"mean": self.means[name], "std": self.stds[name]} for name in self.means},
            },
            "test_time_statistics": self._test_time_statistics() if finished else None,
        }
        return record

    def _check_output(self) -> None:
        with torch.no_grad(), probes.batch_statistics(self.model):
            output = self.model(self.data.x_test[:2])
        wanted = (2, self.data.classes)
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape != wanted:
            raise ValueError(f"the network gives {shape} for two examples, not {wanted}")

    def _train(self, report: Callable[[int], None]) -> bool:
        """Train to the end, or until the loss is no longer finite; whether it stayed so."""
        step = 0
        for epoch in range(1, self.task.epochs + 1):
            self.model.train()
            for x, y in self._batches(epoch):
                loss = self.learner.backward(x, y)
                self.step_loss.append(loss)
                if not math.isfinite(loss):
                    return False
                if step in self.probe_at:
                    self._probe(step)
                self.learner.update()
                step += 1
                if step % _STEPS_PER_REPORT == 0:
                    report(_STEPS_PER_REPORT)
                if self.steps_to_target is None and step >= self.next_check:
                    self._check_target(step)
            if not self._record_epoch(epoch):
                return False
        return True

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(1_000_003 * self.task.seed + epoch)
        order = torch.randperm(len(self.data.x_train), generator=random)
        for number in range(self.steps_per_epoch):
            rows = order[number * self.task.batch_size : (number + 1) * self.task.batch_size]
            yield self.data.x_train.index_select(0, rows), self.data.y_train.index_select(0, rows)

    def _check_target(self, step: int) -> None:
        """Look up whether the target is reached; the next time at most a tenth of the steps later."""
        last = self.steps_per_epoch * self.task.epochs
        self.next_check = min(step + max(self.check_every, step // 10), max(step + 1, last))
        if reaches(self.model, self.data.x_test, self.data.y_test, self.task.target_accuracy):
            self.steps_to_target = step
        self.model.train()

    def _probe(self, step: int) -> None:
        self.probed.append(step)
        for name, norm in probes.gradient_norms(self.learner.layers).items():
            self.gradients[name].append(norm)
        spread = probes.input_spread(self.model, self.x_seen[:_PROBE_BATCH])
        for name in self.means:
            mean, std = spread.get(name, (math.nan, math.nan))
            self.means[name].append(mean)
            self.stds[name].append(std)

    def _record_epoch(self, epoch: int) -> bool:
        train_loss, train_accuracy = evaluate(self.model, self.x_seen, self.y_seen)
        test_loss, test_accuracy = evaluate(self.model, self.data.x_test, self.data.y_test)
        self.epochs.append(
            {
                "epoch": epoch,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
            }
        )
        return math.isfinite(train_loss) and math.isfinite(test_loss)

    def _test_time_statistics(self) -> dict[str, float] | None:
        if not probes.batch_norms(self.model):
            return None
        x, y = self.data.x_test, self.data.y_test
        calibrated = copy.deepcopy(self.model)
        calibrate(calibrated, _in_batches(_EVALUATION_BATCH, self.data.x_train, self.data.y_train))
        return {
            "batch": batch_statistics_accuracy(self.model, x, y, self.task.batch_size),
            "running": self.epochs[-1]["test_accuracy"],
            "calibrated": evaluate(calibrated, x, y)[1],
        }


def _fixed_sample(data: TensorData) -> tuple[Tensor, Tensor]:
    """Training examples that every run is evaluated on, at most 1,000, in an order of their own.

    Training accuracy, near 1, needs no more; all of them would take a fifth of a run's time.
    """
    size = min(len(data.x_test), _TRAINING_SAMPLE)
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
