"""What a study measured, read from `results.json` and checked; NaN stands for a value that is not there."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from batchnorm.errors import DataError, FileError
from batchnorm.study.records import MOST_OF_A_STUDY, read_json

NAN = math.nan
KINDS_OF_TEST_STATISTICS = ("batch", "running", "calibrated")


@dataclass(frozen=True)
class Sample:
    """One quantity over seeds or repetitions; NaN marks a value that was not reached or not finite."""

    values: tuple[float, ...]

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
class Epoch:
    """Loss and accuracy (0..1) after one epoch, on training and held-out data."""

    number: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class Series:
    """One quantity of one layer over training steps."""

    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Drift:
    """Mean and spread (standard deviation) of one layer's input over training steps."""

    steps: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One training run: an arm of a network at one learning rate with one seed."""

    network: str
    arm: str
    rate: float
    seed: int
    diverged: bool
    epochs: tuple[Epoch, ...]
    steps_per_epoch: float
    steps_to_target: float
    target_accuracy: float
    target_checked_every: float
    gradients: Mapping[str, Series]
    drift: Mapping[str, Drift]
    test_time: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        """Held-out accuracy at the end; 0 for a diverged run, which leaves no network to use."""
        if self.diverged:
            return 0.0
        return self.epochs[-1].test_accuracy if self.epochs else NAN

    @property
    def train_accuracy(self) -> float:
        """Accuracy on the training data at the end."""
        return self.epochs[-1].train_accuracy if self.epochs else NAN

    @property
    def steps(self) -> float:
        """Training steps that the run took part in."""
        return self.steps_per_epoch * max((epoch.number for epoch in self.epochs), default=NAN)


@dataclass(frozen=True)
class Network:
    """All runs of one network, and the summary of each arm at its best learning rate."""

    name: str
    runs: tuple[Run, ...]
    best_rate: Mapping[str, float]
    summary: Mapping[str, Mapping[str, Sample]]

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """Arms in the order in which they were run."""
        return tuple(dict.fromkeys(run.arm for run in self.runs))

    @cached_property
    def rates(self) -> tuple[float, ...]:
        """Learning rates tried, ascending."""
        return tuple(sorted({run.rate for run in self.runs}))

    @cached_property
    def seeds(self) -> int:
        """How many different seeds were run."""
        return len({run.seed for run in self.runs})

    @cached_property
    def length(self) -> float:
        """Steps of a full-length run."""
        return max((run.steps for run in self.runs if math.isfinite(run.steps)), default=NAN)

    @cached_property
    def target(self) -> float:
        """The held-out accuracy (0..1) that "steps to target" counts to."""
        return next((run.target_accuracy for run in self.runs if math.isfinite(run.target_accuracy)), NAN)

    def at(self, arm: str, rate: float) -> dict[int, Run]:
        """Runs of an arm at a learning rate, by seed."""
        return {run.seed: run for run in self.runs if run.arm == arm and run.rate == rate}

    def at_best(self, arm: str) -> dict[int, Run]:
        """Runs of an arm at its best learning rate, by seed; at the smallest if none was usable."""
        rate = self.best_rate.get(arm, NAN)
        if not math.isfinite(rate):
            rate = min((run.rate for run in self.runs if run.arm == arm), default=NAN)
        return self.at(arm, rate)

    def diverged(self, arm: str | None = None) -> int:
        """How many runs, of this arm or of all, diverged."""
        return sum(run.diverged for run in self.runs if arm in (None, run.arm))


@dataclass(frozen=True)
class Study:
    """Everything that a report is made of."""

    networks: tuple[Network, ...]
    provenance: Mapping[str, Any]


def read(path: Path) -> Study:
    """Read and check a `results.json`.

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
        return _study(content)
    except DataError as error:
        raise DataError(f"{path} is not the result of a study: {error}; {remedy}") from error


def _study(content: object) -> Study:
    top = _mapping(content, "the top level")
    runs = [_run(item, f"runs[{i}]") for i, item in enumerate(_list(top.get("runs"), "runs"))]
    if not runs:
        raise DataError("runs is empty")
    summaries = _mapping(top.get("networks", {}), "networks")
    names = dict.fromkeys([*(name for name in summaries), *(run.network for run in runs)])
    networks = [_network(name, runs, summaries.get(name, {})) for name in names]
    return Study(
        networks=tuple(network for network in networks if network.runs),
        provenance=_mapping(top.get("provenance", {}), "provenance"),
    )


def _network(name: str, runs: Iterable[Run], summary: object) -> Network:
    best: dict[str, float] = {}
    samples: dict[str, dict[str, Sample]] = {}
    for arm, metrics in _mapping(summary, f"networks.{name}").items():
        where = f"networks.{name}.{arm}"
        fields = _mapping(metrics, where)
        best[arm] = _number(fields.get("best_learning_rate"), f"{where}.best_learning_rate")
        samples[arm] = {
            metric: _sample(value, f"{where}.{metric}")
            for metric, value in fields.items()
            if isinstance(value, (dict, int, float)) and metric != "best_learning_rate"
        }
    return Network(name, tuple(run for run in runs if run.network == name), best, samples)


def _sample(value: object, where: str) -> Sample:
    if isinstance(value, dict):
        return Sample(_numbers(value.get("values"), f"{where}.values"))
    return Sample((_number(value, where),))


def _run(value: object, where: str) -> Run:
    fields = _mapping(value, where)
    gradients = _mapping(fields.get("gradient_norm") or {}, f"{where}.gradient_norm")
    drift = _mapping(fields.get("input_drift") or {}, f"{where}.input_drift")
    test_time = _mapping(fields.get("test_time_statistics") or {}, f"{where}.test_time_statistics")
    rate = _number(fields.get("learning_rate"), f"{where}.learning_rate")
    seed = _number(fields.get("seed"), f"{where}.seed")
    if not (rate > 0 and seed == seed):
        raise DataError(f"{where} has no positive learning_rate or no seed")
    return Run(
        network=_text(fields.get("network"), f"{where}.network"),
        arm=_text(fields.get("arm"), f"{where}.arm"),
        rate=rate,
        seed=int(seed),
        diverged=fields.get("status") != "finished",
        epochs=tuple(
            _epoch(item, f"{where}.epochs") for item in _list(fields.get("epochs"), f"{where}.epochs")
        ),
        steps_per_epoch=_number(fields.get("steps_per_epoch"), f"{where}.steps_per_epoch"),
        steps_to_target=_number(fields.get("steps_to_target"), f"{where}.steps_to_target"),
        target_accuracy=_number(fields.get("target_accuracy"), f"{where}.target_accuracy"),
        target_checked_every=_number(fields.get("target_checked_every"), f"{where}.target_checked_every"),
        gradients=_gradients(gradients, f"{where}.gradient_norm"),
        drift=_drift(drift, f"{where}.input_drift"),
        test_time={
            kind: _number(test_time.get(kind), f"{where}.test_time_statistics.{kind}")
            for kind in KINDS_OF_TEST_STATISTICS
        },
    )


def _epoch(value: object, where: str) -> Epoch:
    fields = _mapping(value, where)
    names = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
    return Epoch(*(_number(fields.get(name), f"{where}.{name}") for name in names))


def _gradients(fields: Mapping[str, Any], where: str) -> dict[str, Series]:
    steps = _numbers(fields.get("steps", []), f"{where}.steps")
    layers = _mapping(fields.get("layers", {}), f"{where}.layers")
    return {
        layer: Series(steps, _same_length(_numbers(values, f"{where}.{layer}"), steps, f"{where}.{layer}"))
        for layer, values in layers.items()
    }


def _drift(fields: Mapping[str, Any], where: str) -> dict[str, Drift]:
    steps = _numbers(fields.get("steps", []), f"{where}.steps")
    found = {}
    for layer, value in _mapping(fields.get("layers", {}), f"{where}.layers").items():
        moments = _mapping(value, f"{where}.{layer}")
        mean, std = (
            _same_length(
                _numbers(moments.get(name), f"{where}.{layer}.{name}"), steps, f"{where}.{layer}.{name}"
            )
            for name in ("mean", "std")
        )
        found[layer] = Drift(steps, mean, std)
    return found


def _same_length(values: tuple[float, ...], steps: tuple[float, ...], where: str) -> tuple[float, ...]:
    if len(values) != len(steps):
        raise DataError(f"{where} has {len(values)} values for {len(steps)} steps")
    return values


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is {_shown(value)}, an object is needed")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where} is {_shown(value)}, a list is needed")
    return value


def _numbers(value: object, where: str) -> tuple[float, ...]:
    return tuple(_number(item, where) for item in _list(value, where))


def _number(value: object, where: str) -> float:
    if value is None:
        return NAN
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where} is {_shown(value)}, a number is needed")
    try:
        number = float(value)
    except OverflowError:
        return NAN
    return number if math.isfinite(number) else NAN


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {_shown(value)}, a name is needed")
    return value


def _shown(value: object) -> str:
    if value is None:
        return "missing"
    text = reprlib.repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
