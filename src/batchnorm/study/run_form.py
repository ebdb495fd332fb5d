"""The form of what a study stores, declared once: mypy checks those who write it, `fits` the files."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypedDict

# What is not finite when it is measured is null in the file.
Number = float | None

# No measure of a run comes near: it is far beyond float32, and the square of it is still a number.
_LARGEST = 1e100


class Epoch(TypedDict):
    """Loss and accuracy after an epoch, on training and on held-out examples."""

    epoch: int
    train_loss: Number
    train_accuracy: Number
    test_loss: Number
    test_accuracy: Number


class Gradients(TypedDict):
    """Gradient norms of each layer, at some steps."""

    steps: list[int]
    layers: dict[str, list[Number]]


class Moments(TypedDict):
    """Mean and standard deviation of a layer's input, at some steps."""

    mean: list[Number]
    std: list[Number]


class Drift(TypedDict):
    """Moments of each layer's input, at some steps."""

    steps: list[int]
    layers: dict[str, Moments]


class TestTimeStatistics(TypedDict):
    """Held-out accuracy by the statistics that norms take."""

    batch: Number
    running: Number
    calibrated: Number


class Run(TypedDict):
    """One training run."""

    network: str
    arm: str
    learning_rate: float
    seed: int
    status: Literal["finished", "diverged"]
    epochs: list[Epoch]
    step_loss: list[Number]
    steps_per_epoch: int
    batch_size: int
    target_accuracy: float
    steps_to_target: int | None
    target_checked_every: int
    parameters: int
    bytes_kept_for_backward: int | None
    gradient_norm: Gradients
    input_drift: Drift
    test_time_statistics: TestTimeStatistics | None


class ArmTiming(TypedDict):
    """Seconds per training step of an arm, one median per block."""

    seconds_per_step: list[float]


Timing = dict[str, dict[str, ArmTiming]]  # by network and arm


class TimingFile(TypedDict):
    """What `timing.json` holds beside its settings."""

    threads: int
    timing: Timing


def fits(value: object, form: object) -> bool:
    """Whether a value from JSON has a form: a TypedDict, a list, a dict, a Literal, a union or a plain type.

    An object has exactly the fields of its TypedDict. Numbers are finite, and none is beyond 1e100.
    """
    return _test_of(form)(value)


@functools.cache
def _test_of(form: object) -> Callable[[object], bool]:
    """Make the test of a form once: a study's files hold millions of numbers."""
    origin, inner = typing.get_origin(form), typing.get_args(form)
    if typing.is_typeddict(form):
        fields = {name: _test_of(of) for name, of in typing.get_type_hints(form).items()}
        return lambda value: (
            isinstance(value, dict)
            and value.keys() == fields.keys()
            and all(test(value[name]) for name, test in fields.items())
        )
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in inner
    if origin is list:
        item = _test_of(inner[0])
        return lambda value: isinstance(value, list) and all(map(item, value))
    if origin is dict:
        item = _test_of(inner[1])
        return lambda value: isinstance(value, dict) and all(map(item, value.values()))
    if origin is types.UnionType:
        tests = [_test_of(one) for one in inner]
        return lambda value: any(test(value) for test in tests)
    if form is float or form is int:
        wanted = (int, float) if form is float else (int,)
        return lambda value: type(value) in wanted and abs(typing.cast(float, value)) <= _LARGEST
    plain = typing.cast(type, form)
    return lambda value: isinstance(value, plain)


def is_run(value: object, settings: dict[str, object]) -> bool:
    """Whether a value is the whole record of the run that `settings` asks for, as `run_record` makes it."""
    if not fits(value, Run):
        return False
    run = typing.cast(Run, value)
    asked = ("network", "arm", "learning_rate", "seed", "batch_size", "target_accuracy")
    epochs, series = len(run["epochs"]), [*run["gradient_norm"]["layers"].values()]
    drift = [moments[name] for moments in run["input_drift"]["layers"].values() for name in ("mean", "std")]
    return (
        all(run[name] == settings[name] for name in asked)  # type: ignore[literal-required]
        and [row["epoch"] for row in run["epochs"]] == list(range(1, epochs + 1))
        and (epochs == settings["epochs"] or run["status"] == "diverged")
        and run["steps_per_epoch"] > 0
        and run["target_checked_every"] > 0
        and _have_length(series, run["gradient_norm"]["steps"])
        and _have_length(drift, run["input_drift"]["steps"])
    )


def is_timing(value: object, networks: Mapping[str, Sequence[str]]) -> bool:
    """Whether a value holds the timing of every arm of these networks, as `timing.in_turns` measures it."""
    if not fits(value, TimingFile):
        return False
    timing = typing.cast(TimingFile, value)["timing"]
    return timing.keys() == networks.keys() and all(
        timing[network].keys() == set(arms)
        and all(
            measured["seconds_per_step"] and min(measured["seconds_per_step"]) > 0
            for measured in timing[network].values()
        )
        for network, arms in networks.items()
    )


def _have_length(series: list[list[Number]], steps: list[int]) -> bool:
    return all(len(values) == len(steps) for values in series)
