"""From the records of all runs to `results.json` and `curves.csv`; NumPy only."""

from __future__ import annotations

import csv
import datetime
import io
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

import batchnorm
from batchnorm.errors import in_one_line

from .arms import L1_STRENGTH, L2_STRENGTH
from .data import Dataset
from .frameworks import Framework
from .options import StudyOptions, display_name, usable_cores
from .records import Record
from .run_form import Timing


def summarize(
    options: StudyOptions,
    data: Dataset,
    records: Sequence[Record],
    timing: Timing,
    timing_threads: int,
    framework: Framework,
) -> dict[str, Any]:
    """Everything that a study measured, as `results.json` holds it.

    Args:
        options: what was asked for.
        data: what it was measured on.
        records: one for each run.
        timing: `{network: {arm: {"seconds_per_step": [seconds]}}}`.
        timing_threads: threads of the framework while timing.
        framework: what it was measured in.
    """
    names = [display_name(network) for network in options.networks]
    networks = {
        name: {arm: _at_best_rate(name, arm, options, records, timing) for arm in options.arms}
        for name in names
    }
    return {
        "arms": {
            arm: {metric: value for metric, value in measured.items() if isinstance(value, dict)}
            for arm, measured in networks[names[0]].items()
        },
        "networks": networks,
        "provenance": _provenance(options, data, timing_threads, framework),
        "timing": timing,
        "runs": [{key: value for key, value in record.items() if key != "settings"} for record in records],
    }


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation over the values that are there; 0 spread for a single one."""
    there = [value for value in values if value is not None]
    mean = float(np.mean(there)) if there else None
    std = float(np.std(there, ddof=1)) if len(there) > 1 else (0.0 if there else None)
    return {"mean": mean, "std": std, "values": list(values)}


def curves_csv(records: Sequence[Record]) -> str:
    """One line for each epoch of each run; no name in it is a formula to a spreadsheet."""
    measures = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("network", "arm", "learning_rate", "seed", "epoch", "step", *measures))
    for record in records:
        for row in record["epochs"]:
            step = row["epoch"] * record["steps_per_epoch"]
            names = (_no_formula(record[key]) for key in ("network", "arm"))
            numbers = (record["learning_rate"], record["seed"], row["epoch"], step)
            writer.writerow((*names, *numbers, *(row[measure] for measure in measures)))
    return text.getvalue()


def _no_formula(name: str) -> str:
    """A name in one line, behind an apostrophe where a spreadsheet would compute it, as OWASP has it."""
    line = in_one_line(name)
    return f"'{line}" if line.lstrip().startswith(("=", "+", "-", "@")) else line


def _at_best_rate(
    network: str, arm: str, options: StudyOptions, records: Sequence[Record], timing: Timing
) -> dict[str, Any]:
    """An arm's measures at the rate of the highest mean held-out accuracy; a diverged run counts as 0."""
    by_rate = {
        rate: [
            record
            for record in records
            if (record["network"], record["arm"], record["learning_rate"]) == (network, arm, rate)
        ]
        for rate in sorted(options.learning_rates)
    }
    best = max(
        by_rate, key=lambda rate: np.mean([_final(run, "test_accuracy") or 0.0 for run in by_rate[rate]])
    )
    runs = by_rate[best]
    seconds = timing[network][arm]["seconds_per_step"]
    steps = [run["steps_to_target"] if run["status"] == "finished" else None for run in runs]
    return {
        "best_learning_rate": best,
        "diverged": sum(run["status"] == "diverged" for run in runs),
        "test_accuracy": spread([_final(run, "test_accuracy") for run in runs]),
        "train_accuracy": spread([_final(run, "train_accuracy") for run in runs]),
        "test_loss": spread([_final(run, "test_loss") for run in runs]),
        "generalization_gap": spread([_gap(run) for run in runs]),
        "steps_to_target": {**spread(steps), "reached": sum(step is not None for step in steps)},
        "seconds_per_step": {**spread(seconds), "median": float(np.median(seconds))},
        "bytes_kept_for_backward": spread([run["bytes_kept_for_backward"] for run in runs]),
        "parameters": spread([run["parameters"] for run in runs]),
    }


def _final(run: Record, measure: str) -> float | None:
    if run["status"] != "finished":
        return None
    value: float | None = run["epochs"][-1][measure]
    return value


def _gap(run: Record) -> float | None:
    train, test = _final(run, "train_accuracy"), _final(run, "test_accuracy")
    return None if train is None or test is None else train - test


def _provenance(
    options: StudyOptions, data: Dataset, timing_threads: int, framework: Framework
) -> dict[str, Any]:
    packages = {**dict(framework.versions), "numpy": version("numpy")}
    return {
        "command": options.command(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **framework.describe(),
        "versions": {"python": platform.python_version(), **packages, "batchnorm": batchnorm.__version__},
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_count": usable_cores(),
        "device": "cpu",
        "threads": {"training": 1, "timing": timing_threads},
        "workers": options.workers,
        "data": data.describe(),
        "networks": [display_name(network) for network in options.networks],
        "arms": list(options.arms),
        "learning_rates": list(options.learning_rates),
        "seeds": list(range(options.seeds)),
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "target_accuracy": options.target_accuracy,
        "train_accuracy": "on at most 1,000 training examples, the same ones in every run",
        "optimizer": "Adam (betas 0.9 and 0.999, eps 1e-8, no schedule)",
        "penalties": {"l1": f"{L1_STRENGTH:g} * sum |w|", "l2": f"{L2_STRENGTH:g} * sum w^2"},
        "best_rate": "highest mean held-out accuracy after the last epoch, on the examples that are reported",
        "std": "sample standard deviation over seeds; of seconds_per_step, over blocks of steps",
    }
