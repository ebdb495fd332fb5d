"""Tasks of a study with few words, for tests."""

from __future__ import annotations

from typing import Any

from batchnorm.studies.settings import Recipe, Setting
from batchnorm.studies.tasks import RunTask, TimingTask


def run_task(
    network: str,
    arm: str = "batchnorm",
    *,
    data: str = "data",
    rate: float = 1e-2,
    seed: int = 0,
    batch_size: int = 20,
    **recipe: Any,
) -> RunTask:
    """Returns one run, of one epoch and with a target of 0.9 unless `recipe` says otherwise."""
    chosen = Recipe(**{"epochs": 1, "target_accuracy": 0.9, **recipe})
    return RunTask(Setting(data, network, batch_size), chosen, arm, rate, seed)


def timing_task(
    network: str, arms: tuple[str, ...], *, data: str = "data", batch_size: int = 20
) -> TimingTask:
    """Returns the timing of some arms."""
    return TimingTask(Setting(data, network, batch_size), Recipe(), arms)
