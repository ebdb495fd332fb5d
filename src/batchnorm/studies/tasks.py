"""The tasks of a worker process: one training run, or the timing of a setting's arms."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

from batchnorm.version import __version__

from .data import Dataset
from .frameworks import Framework
from .options import StudyOptions
from .settings import Recipe, Setting, display_name, run_name, shown_number
from .user_code import is_user_code, source_of

_FORMAT = 4  # of the record that a run leaves; older ones are not mixed with newer ones


@dataclass(frozen=True)
class RunTask:
    """One training run: a setting, an arm, a learning rate and a seed."""

    setting: Setting
    recipe: Recipe
    arm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The run's file name without its ending."""
        return run_name(self.setting, self.arm, self.learning_rate, self.seed)

    def describe(self) -> str:
        """Returns what is done, for messages."""
        rate = f"learning rate {shown_number(self.learning_rate)}"
        return f"{_where(self.setting)}, arm {self.arm}, {rate}, seed {self.seed}"


@dataclass(frozen=True)
class TimingTask:
    """Seconds per training step of one network in every arm, interleaved."""

    setting: Setting
    recipe: Recipe
    arms: tuple[str, ...]

    def describe(self) -> str:
        """Returns what is done, for messages."""
        return f"{_where(self.setting)}, timing"


def plan(options: StudyOptions) -> list[RunTask]:
    """Returns every run of a study: one setting after the other, and in each one seed after the other.

    So the first verdict comes early, and a study cut short compares all arms.
    """
    return [
        RunTask(setting, options.recipe(setting.data), arm, rate, seed)
        for setting in options.settings()
        for seed in range(options.seeds)
        for rate in options.rates_on(setting.data)
        for arm in options.arms_on(setting.data)
    ]


def settings_of(
    task: RunTask | TimingTask, data: Dataset, data_fingerprint: str, framework: Framework
) -> dict[str, object]:
    """Returns all that decides a task's outcome; a stored result counts only where all of it is the same."""
    setting, network = asdict(task.setting), task.setting.network
    settings: dict[str, object] = {"format": _FORMAT, **setting, **asdict(task.recipe)}
    settings |= {name: value for name, value in vars(task).items() if name not in ("setting", "recipe")}
    settings["network"] = display_name(network)
    if isinstance(task, TimingTask):
        settings["arms"] = list(task.arms)
    settings["network_source"] = _digest_of_source(network)
    for what in ("loss", "metric"):
        name = getattr(task.recipe, what)
        settings[what], settings[f"{what}_source"] = display_name(name), _digest_of_source(name)
    settings["data"] = f"{data.name} {data_fingerprint}"
    settings |= framework.settings()
    settings["batchnorm"] = __version__
    return settings


def _where(setting: Setting) -> str:
    where = f"data {display_name(setting.data)}, batch size {setting.batch_size}"
    return f"{where}, network {setting.network_name}"


def _digest_of_source(name: str) -> str | None:
    """Returns a digest of the user's file that a name points at; None for what a study knows by name."""
    source = source_of(name) if is_user_code(name) else None
    return hashlib.sha256(source.read_bytes()).hexdigest()[:16] if source and source.is_file() else None
