"""Results of `batchnorm study` by default, and their tables: a row per network and arm, at its best rate."""

from __future__ import annotations

import tempfile
from pathlib import Path

from batchnorm.studies.options import StudyOptions
from batchnorm.studies.runner import run_study

from .tables import Row, Rows, table_of

_QUICK = {"data": ("digits",), "networks": ("mlp",), "learning_rates": (1e-3,), "seeds": 1, "epochs": 1}
_MEASURES = (
    "best_learning_rate",
    "test_accuracy",
    "train_accuracy",
    "steps_to_target",
    "seconds_per_step",
    "bytes_kept_for_backward",
    "diverged",
)


def measure(quick: bool = False) -> Rows:
    """Run the study from nothing and return its arms."""
    with tempfile.TemporaryDirectory() as folder:
        options = StudyOptions(out=Path(folder), **(_QUICK if quick else {}))  # type: ignore[arg-type]
        results = run_study(options).results
    return [
        {"network": network, "arm": arm, **{name: found[name] for name in _MEASURES}}
        for network, arms in results["networks"].items()
        for arm, found in arms.items()
    ]


def study_table(rows: Rows) -> str:
    """Every network and arm at its best learning rate, and what the study was."""
    return f"{_told(rows)}\n\n{table_of(map(_study_row, rows))}"


def study_summary(rows: Rows) -> str:
    """The same, for the arms with nothing and with batch normalization."""
    return study_table([row for row in rows if row["arm"] in ("none", "batchnorm")])


def _told(rows: Rows) -> str:
    """Say what was trained, how often, and what the columns are."""
    seeds = {len(row["test_accuracy"]["values"]) for row in rows}
    networks = list(dict.fromkeys(row["network"] for row in rows))
    return (
        f"The default study trained {len(networks)} networks ({', '.join(networks)}) with "
        f"{' or '.join(map(str, sorted(seeds)))} seeds. Each arm, a way to train a network, is shown at the "
        "learning rate of its best held-out accuracy; ± is the standard deviation over seeds."
    )


def _study_row(row: Row) -> dict[str, str]:
    accuracy, steps = row["test_accuracy"], row["steps_to_target"]
    found = (
        "diverged" if accuracy["mean"] is None else f"{accuracy['mean']:.1%} ± {100 * accuracy['std']:.1f}"
    )
    return {
        "network": row["network"],
        "arm": row["arm"],
        "best rate": f"{row['best_learning_rate']:g}",
        "held-out accuracy": found,
        "steps to target": f"{steps['mean']:.0f} ± {steps['std']:.0f}" if steps["reached"] else "not reached",
        "ms per step": f"{row['seconds_per_step']['median'] * 1e3:.2f}",
        "memory for the backward, kB": f"{row['bytes_kept_for_backward']['mean'] / 1e3:.0f}",
    }
