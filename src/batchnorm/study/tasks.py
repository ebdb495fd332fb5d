"""The tasks of a worker process: one training run, or the timing of a network's arms."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import batchnorm

from .data import Dataset
from .frameworks import Framework
from .networks import NETWORKS
from .options import StudyOptions, display_name, run_name, shown_number
from .user_code import source_of

_FORMAT = 2  # of the record that a run leaves; older ones are not mixed with newer ones


@dataclass(frozen=True)
class RunTask:
    """One training run: a network, an arm, a learning rate and a seed."""

    network: str
    arm: str
    learning_rate: float
    seed: int
    epochs: int
    batch_size: int
    target_accuracy: float

    @property
    def name(self) -> str:
        """The run's file name without its ending."""
        return run_name(self.network, self.arm, self.learning_rate, self.seed)

    def describe(self) -> str:
        rate = f"learning rate {shown_number(self.learning_rate)}"
        return f"network {display_name(self.network)}, arm {self.arm}, {rate}, seed {self.seed}"


@dataclass(frozen=True)
class TimingTask:
    """Seconds per training step of one network in every arm, interleaved."""

    network: str
    arms: tuple[str, ...]
    batch_size: int

    def describe(self) -> str:
        return f"network {display_name(self.network)}, timing"


def plan(options: StudyOptions) -> list[RunTask]:
    """Returns every run of a study, one seed after the other, so that a study cut short compares all arms."""
    return [
        RunTask(network, arm, rate, seed, options.epochs, options.batch_size, options.target_accuracy)
        for seed in range(options.seeds)
        for rate in options.learning_rates
        for arm in options.arms
        for network in options.networks
    ]


def settings_of(
    task: RunTask | TimingTask, data: Dataset, data_fingerprint: str, framework: Framework
) -> dict[str, object]:
    """Returns all that decides a task's outcome; a stored result counts only where all of it is the same."""
    settings: dict[str, object] = {"format": _FORMAT, **asdict(task)}
    settings["network"] = display_name(task.network)
    if isinstance(task, TimingTask):
        settings["arms"] = list(task.arms)
    settings["network_source"] = _digest_of_source(task.network)
    settings["data"] = f"{data.name} {data_fingerprint}"
    settings |= framework.settings()
    settings["batchnorm"] = batchnorm.__version__
    return settings


def _digest_of_source(network: str) -> str | None:
    if network in NETWORKS:
        return None
    source = source_of(network)
    return hashlib.sha256(source.read_bytes()).hexdigest()[:16] if source and source.is_file() else None
