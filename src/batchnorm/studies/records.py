"""The records of a study, as dataclasses: `json_files` writes, reads and checks files by their fields."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from .settings import Setting

NAN = math.nan

# A measure. What is not finite when it is measured, or was not measured, is null in a file and NaN in memory.
NULLABLE = "null stands for NaN"
Number = Annotated[float, NULLABLE]


@dataclass(frozen=True)
class Epoch:
    """Loss and accuracy (0..1) after an epoch, on training and on held-out examples."""

    epoch: Number
    train_loss: Number
    train_accuracy: Number
    test_loss: Number
    test_accuracy: Number


@dataclass(frozen=True)
class Gradients:
    """Gradient norms of each layer, at some steps."""

    steps: Sequence[int] = ()
    layers: Mapping[str, Sequence[Number]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_lengths(self.layers.items(), self.steps)


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of a layer's input, at some steps."""

    mean: Sequence[Number]
    std: Sequence[Number]


@dataclass(frozen=True)
class Drift:
    """Moments of each layer's input, at some steps."""

    steps: Sequence[int] = ()
    layers: Mapping[str, Moments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, moments in self.layers.items():
            _check_lengths((("mean", moments.mean), ("std", moments.std)), self.steps, f"{layer}.")


@dataclass(frozen=True)
class AccuracyByStatistics:
    """Held-out accuracy under each kind of statistics that batch normalizations can use at test time."""

    batch: Number = NAN
    running: Number = NAN
    calibrated: Number = NAN


@dataclass(frozen=True)
class Movement:
    """The distances by which predictions move when the same examples are served in another way.

    Half the sum of absolute differences of an example's probabilities (total variation, 0..1), averaged over
    held-out examples.

    Attributes:
        by_mates: with other examples in the batch.
        by_padding: with more padding; NaN for a network that takes sequences of one length only.
    """

    by_mates: Number = NAN
    by_padding: Number = NAN


@dataclass(frozen=True)
class Movements:
    """Movement of predictions by running statistics, and by those of each batch, as in training."""

    running: Movement
    batch: Movement


@dataclass(frozen=True)
class Run:
    """One training run: an arm of a network at one learning rate with one seed."""

    learning_rate: float
    seed: int
    data: str
    network: str
    depth: int | None
    arm: str
    status: Literal["finished", "diverged"]
    epochs: Sequence[Epoch]
    step_loss: Sequence[Number]
    steps_per_epoch: Number
    batch_size: int
    target_accuracy: Number
    steps_to_target: Number
    target_checked_every: Number
    parameters: int
    bytes_kept_for_backward: Number
    gradient_norm: Gradients = field(default_factory=Gradients)
    input_drift: Drift = field(default_factory=Drift)
    test_time_statistics: AccuracyByStatistics | None = None
    movements: Movements | None = None  # of data with padding

    @property
    def setting(self) -> Setting:
        """The setting in which its arm is compared with others."""
        return Setting(self.data, self.network, self.batch_size, self.depth)

    @property
    def diverged(self) -> bool:
        """Whether the loss stopped being finite, which ended the run."""
        return self.status == "diverged"

    @property
    def accuracy(self) -> float:
        """Held-out accuracy at the end; 0 for a diverged run, which leaves no network to use."""
        if self.diverged:
            return 0.0
        return self.epochs[-1].test_accuracy if self.epochs else NAN

    @property
    def train_accuracy(self) -> float:
        """Accuracy on training data at the end."""
        return self.epochs[-1].train_accuracy if self.epochs else NAN

    @property
    def steps(self) -> float:
        """Training steps in whole epochs."""
        return self.steps_per_epoch * max((epoch.epoch for epoch in self.epochs), default=NAN)

    def answers(self, settings: Mapping[str, object]) -> bool:
        """Returns whether this is the whole run that `settings` ask for."""
        asked = ("network", "depth", "arm", "learning_rate", "seed", "batch_size", "target_accuracy")
        epochs = len(self.epochs)
        return (
            all(getattr(self, name) == settings[name] for name in asked)
            and str(settings["data"]).rpartition(" ")[0] == self.data
            and [row.epoch for row in self.epochs] == list(range(1, epochs + 1))
            and (epochs == settings["epochs"] or self.diverged)
            and self.steps_per_epoch > 0
            and self.target_checked_every > 0
        )


@dataclass(frozen=True)
class ArmTiming:
    """The time that an arm takes.

    Attributes:
        seconds_per_step: one median per block of training steps.
        seconds_per_prediction: of a batch of held-out examples.
        bytes_kept_for_backward: from the forward of a step to its backward; NaN where it is not measured.
    """

    seconds_per_step: Sequence[float]
    seconds_per_prediction: float
    bytes_kept_for_backward: Number = NAN


@dataclass(frozen=True)
class Timing:
    """Seconds per training step in one setting, by arm."""

    arms: Mapping[str, ArmTiming]

    def answers(self, arms: Iterable[str]) -> bool:
        """Returns whether every one of these arms, and nothing else, has been timed."""
        return self.arms.keys() == set(arms) and all(
            arm.seconds_per_step and min(arm.seconds_per_step) > 0 for arm in self.arms.values()
        )


def _check_lengths(
    series: Iterable[tuple[str, Sequence[float]]], steps: Sequence[int], before: str = ""
) -> None:
    for name, values in series:
        if len(values) != len(steps):
            raise ValueError(f"{before}{name} has {len(values)} values for {len(steps)} steps")
