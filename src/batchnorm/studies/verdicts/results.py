"""The results of a study, read from `results.json`: NaN stands for a value that is not there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median

from batchnorm.errors import DataError, FileError
from batchnorm.studies.arms import split_outside_brackets
from batchnorm.studies.json_files import MOST_OF_A_STUDY, convert, read_json
from batchnorm.studies.records import NAN, ArmTiming, Number, Run
from batchnorm.studies.settings import Setting

KINDS_OF_TEST_STATISTICS = ("batch", "running", "calibrated")

# The arm that the claims are about, and the one that it is held against.
SUBJECT = "batchnorm"
BASELINE = "none"
# The framework's own layer, which is timed beside the subject even where it is not trained.
STOCK = "stock"
# The subject without the mask of padding.
UNMASKED = "batchnorm:unmasked"


@dataclass(frozen=True)
class Sample:
    """One quantity over seeds or repetitions; NaN marks a value that was not reached or not finite."""

    values: Sequence[Number] = ()

    @cached_property
    def finite(self) -> tuple[float, ...]:
        """The values that are numbers."""
        return tuple(value for value in self.values if math.isfinite(value))

    @property
    def mean(self) -> float:
        """Mean of the finite values, NaN where there are none."""
        return sum(self.finite) / len(self.finite) if self.finite else NAN

    @property
    def median(self) -> float:
        """Median of the finite values, NaN where there are none: for times, which a busy machine upsets."""
        return median(self.finite) if self.finite else NAN

    @property
    def std(self) -> float:
        """Standard deviation (n - 1) of the finite values, NaN for fewer than two."""
        n = len(self.finite)
        if n < 2:
            return NAN
        return math.sqrt(sum((value - self.mean) ** 2 for value in self.finite) / (n - 1))


@dataclass(frozen=True)
class Summary:
    """An arm of a network at its best learning rate."""

    best_learning_rate: Number = NAN
    test_accuracy: Sample = Sample()
    train_accuracy: Sample = Sample()
    generalization_gap: Sample = Sample()
    steps_to_target: Sample = Sample()
    seconds_per_step: Sample = Sample()
    bytes_kept_for_backward: Sample = Sample()


Runs = Mapping[int, Run]  # by seed


@dataclass(frozen=True)
class Network:
    """All runs of one network on one data set at one batch size, and the summary of each arm."""

    name: str
    runs: Sequence[Run]
    summaries: Mapping[str, Summary]

    @property
    def setting(self) -> Setting:
        """The setting of its runs."""
        return self.runs[0].setting

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """Arms in the order in which they were run."""
        return tuple(dict.fromkeys(run.arm for run in self.runs))

    @property
    def timed(self) -> tuple[str, ...]:
        """The arms whose step was timed: those of the runs, and the framework's own layer."""
        is_alone = STOCK in self.summaries and STOCK not in self.arms
        return (*self.arms, STOCK) if is_alone else self.arms

    @property
    def pair(self) -> tuple[Runs, Runs] | None:
        """Runs with batch normalization and runs without, each at its best rate."""
        if SUBJECT in self.arms and BASELINE in self.arms:
            return self.at_best(SUBJECT), self.at_best(BASELINE)
        return None

    @cached_property
    def rivals(self) -> tuple[str, ...]:
        """The arms that batch normalization is compared with: all without it."""
        return tuple(arm for arm in self.arms if not is_normalized(arm))

    @cached_property
    def rates(self) -> tuple[float, ...]:
        """Learning rates tried, ascending."""
        return tuple(sorted({run.learning_rate for run in self.runs}))

    @cached_property
    def length(self) -> float:
        """Steps of a full-length run."""
        return max((run.steps for run in self.runs if math.isfinite(run.steps)), default=NAN)

    @cached_property
    def target(self) -> float:
        """The held-out accuracy (0..1) that "steps to target" counts to."""
        return next((run.target_accuracy for run in self.runs if math.isfinite(run.target_accuracy)), NAN)

    def summary(self, arm: str) -> Summary:
        """Returns the summary of an arm, without values if there is none."""
        return self.summaries.get(arm, Summary())

    def at(self, arm: str, rate: float) -> Runs:
        """Returns the runs of an arm at a learning rate."""
        return {run.seed: run for run in self.runs if run.arm == arm and run.learning_rate == rate}

    def at_best(self, arm: str) -> Runs:
        """Returns the runs of an arm at its best learning rate; at the smallest if none was usable."""
        rate = self.summary(arm).best_learning_rate
        if not math.isfinite(rate):
            rate = min((run.learning_rate for run in self.runs if run.arm == arm), default=NAN)
        return self.at(arm, rate)

    def diverged(self, arm: str | None = None) -> int:
        """Returns how many runs, of this arm or of all, diverged."""
        return sum(run.diverged for run in self.runs if arm in (None, run.arm))


def is_normalized(arm: str) -> bool:
    """Returns whether the arm has batch normalization in it, ours or the framework's."""
    return any(part.partition(":")[0] in (SUBJECT, "stock") for part in split_outside_brackets(arm, "+"))


def sample(runs: Runs, name: str) -> Sample:
    """Returns an attribute of each run."""
    return Sample(tuple(getattr(run, name) for run in runs.values()))


@dataclass(frozen=True)
class Study:
    """Everything that a report is made of."""

    networks: Sequence[Network]
    provenance: Mapping[str, object]


@dataclass(frozen=True)
class _Results:
    runs: Sequence[Run]
    networks: Mapping[str, Mapping[str, Summary]] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)
    timing: Mapping[str, Mapping[str, ArmTiming]] = field(default_factory=dict)


def with_timed(summaries: Mapping[str, Summary], timing: Mapping[str, ArmTiming]) -> dict[str, Summary]:
    """Returns the summaries, and of each arm that was timed and not trained the cost of its step."""
    timed = {
        arm: Summary(
            seconds_per_step=Sample(found.seconds_per_step),
            bytes_kept_for_backward=Sample((found.bytes_kept_for_backward,)),
        )
        for arm, found in timing.items()
    }
    return {**timed, **summaries}


def read(path: Path) -> Study:
    """Reads and check a `results.json`.

    Raises:
        DataError: the file is missing, unreadable, no JSON, or not of the form that a study writes.
    """
    remedy = "run `batchnorm study` to make one"
    try:
        content = read_json(path, MOST_OF_A_STUDY)
    except FileError as error:
        raise DataError(f"{error}; {remedy}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; {remedy}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); {remedy}") from error
    try:
        results = convert(content, _Results, exact=False)
        if not results.runs:
            raise DataError("runs is empty")
        if not all(run.learning_rate > 0 for run in results.runs):
            raise DataError("runs holds a learning_rate that is not above 0")
    except DataError as error:
        raise DataError(f"{path} is not the result of a study: {error}; {remedy}") from error
    names = {setting: name for name, setting in results.settings.items()}
    runs: dict[str, list[Run]] = {name: [] for name in results.networks}
    for run in results.runs:
        runs.setdefault(names.get(run.setting, run.network), []).append(run)
    networks = [
        Network(name, own, with_timed(results.networks.get(name, {}), results.timing.get(name, {})))
        for name, own in runs.items()
        if own
    ]
    return Study(networks, results.provenance)
