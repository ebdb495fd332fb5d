"""The record of one training run, filled step by step: the same in every framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from .options import display_name
from .run_form import Epoch, Number, Run, TestTimeStatistics
from .tasks import RunTask

TRAINING_SAMPLE = (
    1000  # training accuracy, near 1, needs no more; all of it would take a fifth of a run's time
)
PROBE_BATCH = 128
_PROBES_PER_RUN = 24
_CHECKS_PER_EPOCH = 10
_STEPS_PER_REPORT = 25


def probe_steps(steps: int) -> set[int]:
    """At which steps of a run to look inside: 24 at most, closer together where training moves fastest."""
    last = _PROBES_PER_RUN - 1
    return {round((steps - 1) * (number / last) ** 2) for number in range(_PROBES_PER_RUN)}


class RunRecord:
    """Keeps what a run measures, and says when to measure what.

    Args:
        task: which run.
        examples: how many there are to train on.
        layers: names of the layers that are looked into.
        report: called now and then with the number of steps taken since the last call.
    """

    def __init__(
        self, task: RunTask, examples: int, layers: Iterable[str], report: Callable[[int], None]
    ) -> None:
        self.task = task
        self.steps_per_epoch = examples // task.batch_size
        self.step = 0  # updates taken so far
        self.steps_to_target: int | None = None
        self.epochs: list[Epoch] = []
        self._report = report
        self._step_loss: list[Number] = []
        self._steps = self.steps_per_epoch * task.epochs
        self._probe_at = probe_steps(self._steps)
        self._check_every = math.ceil(self.steps_per_epoch / _CHECKS_PER_EPOCH)
        self._next_check = self._check_every
        self._probed: list[int] = []
        names = list(layers)
        self._gradients: dict[str, list[Number]] = {name: [] for name in names}
        self._means: dict[str, list[Number]] = {name: [] for name in names}
        self._stds: dict[str, list[Number]] = {name: [] for name in names}

    def add_loss(self, loss: float) -> bool:
        """Keep the cross-entropy of the step under way; whether it is finite, so that training goes on."""
        self._step_loss.append(loss)
        return math.isfinite(loss)

    @property
    def probe_is_due(self) -> bool:
        """Whether the step under way is one to look inside."""
        return self.step in self._probe_at

    def add_probe(self, gradients: Mapping[str, float], spread: Mapping[str, tuple[float, float]]) -> None:
        """Keep what was seen inside the step under way: by layer, gradient norms and input moments."""
        self._probed.append(self.step)
        for name in self._gradients:
            self._gradients[name].append(gradients.get(name, math.nan))
            mean, std = spread.get(name, (math.nan, math.nan))
            self._means[name].append(mean)
            self._stds[name].append(std)

    def end_step(self) -> None:
        """The update is taken."""
        self.step += 1
        if self.step % _STEPS_PER_REPORT == 0:
            self._report(_STEPS_PER_REPORT)

    @property
    def check_is_due(self) -> bool:
        """Whether to look up now if the target is reached."""
        return self.steps_to_target is None and self.step >= self._next_check

    def add_check(self, reached: bool) -> None:
        """Keep whether the target is reached; the next time to look is at most a tenth of the steps later."""
        later = self.step + max(self._check_every, self.step // 10)
        self._next_check = min(later, max(self.step + 1, self._steps))
        if reached:
            self.steps_to_target = self.step

    def add_epoch(self, epoch: int, train: tuple[float, float], test: tuple[float, float]) -> bool:
        """Keep (loss, accuracy) on training and held-out data; whether both losses are finite."""
        self.epochs.append(
            {
                "epoch": epoch,
                "train_loss": train[0],
                "train_accuracy": train[1],
                "test_loss": test[0],
                "test_accuracy": test[1],
            }
        )
        return math.isfinite(train[0]) and math.isfinite(test[0])

    def complete(
        self,
        *,
        finished: bool,
        parameters: int,
        bytes_kept: int | None,
        test_time_statistics: TestTimeStatistics | None,
    ) -> Run:
        """The record as it is stored; `bytes_kept` is None where the framework does not tell."""
        return {
            "network": display_name(self.task.network),
            "arm": self.task.arm,
            "learning_rate": self.task.learning_rate,
            "seed": self.task.seed,
            "status": "finished" if finished else "diverged",
            "epochs": self.epochs,
            "step_loss": self._step_loss,
            "steps_per_epoch": self.steps_per_epoch,
            "batch_size": self.task.batch_size,
            "target_accuracy": self.task.target_accuracy,
            "steps_to_target": self.steps_to_target,
            "target_checked_every": self._check_every,
            "parameters": parameters,
            "bytes_kept_for_backward": bytes_kept,
            "gradient_norm": {"steps": self._probed, "layers": self._gradients},
            "input_drift": {
                "steps": self._probed,
                "layers": {
                    name: {"mean": self._means[name], "std": self._stds[name]} for name in self._means
                },
            },
            "test_time_statistics": test_time_statistics,
        }
