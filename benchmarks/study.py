"""Results of `batchnorm study` by default: one row per network and arm, at the arm's best rate."""

from __future__ import annotations

import tempfile
from pathlib import Path

from batchnorm.studies.options import StudyOptions
from batchnorm.studies.runner import run_study

from .tables import Rows

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
