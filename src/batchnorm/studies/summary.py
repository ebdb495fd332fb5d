"""Sums up all runs for `results.json` and `curves.csv`."""

from __future__ import annotations

import csv
import datetime
import io
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from batchnorm.errors import in_one_line
from batchnorm.version import __version__

from .arms import L1_STRENGTH, L2_STRENGTH
from .data import Dataset, source_named
from .frameworks import Framework
from .json_files import convert, json_safe
from .objectives import with_metric
from .options import StudyOptions, usable_cores
from .records import NAN, ArmTiming, Epoch, Run, Timing
from .settings import Setting, display_name, setting_names
from .verdicts import Network, in_short, judge
from .verdicts.results import Summary, with_timed

_ON_A_CLUSTER = "a Dask cluster, whose workers train and time; machine and cores are the client's"
_ALL_THREADS = "one per thread of the workers"
_NO_EPOCH = Epoch(NAN, NAN, NAN, NAN, NAN)


def summarize(
    options: StudyOptions,
    data: Mapping[str, Dataset],
    runs: Sequence[Run],
    timing: Mapping[Setting, Timing],
    framework: Framework,
) -> dict[str, Any]:
    """Returns everything that a study measured, as `results.json` holds it.

    Args:
        options: of the study.
        data: what it was measured on, by name.
        runs: those of its runs that are finished, one at least.
        timing: of every setting.
        framework: what it was measured in.
    """
    names = setting_names(options.settings())
    networks: dict[str, dict[str, Any]] = {}
    for setting, name in names.items():
        place = setting.without_folders()
        by_arm = {
            arm: [run for run in runs if (run.setting, run.arm) == (place, arm)]
            for arm in options.arms_on(setting.data)
        }
        metric = options.recipe(setting.data).metric
        found = {
            arm: _at_best_rate(of_arm, timing[setting].arms[arm], metric)
            for arm, of_arm in by_arm.items()
            if of_arm
        }
        if found:
            networks[name] = found
    first = next(iter(networks.values()))
    return {
        "arms": {
            arm: {metric: value for metric, value in measured.items() if isinstance(value, dict)}
            for arm, measured in first.items()
        },
        "networks": networks,
        "settings": {name: setting.without_folders() for setting, name in names.items()},
        "provenance": _provenance(options, data, framework),
        "timing": {names[setting]: measured.arms for setting, measured in timing.items()},
        "runs": runs,
    }


def verdict_on(name: str, runs: Sequence[Run], timing: Timing, metric: str) -> str:
    """Returns what the runs of one setting say, in short, by the rules of the report."""
    arms = {
        arm: _at_best_rate([run for run in runs if run.arm == arm], timing.arms[arm], metric)
        for arm in dict.fromkeys(run.arm for run in runs)
    }
    summaries = {arm: convert(json_safe(found), Summary, exact=False) for arm, found in arms.items()}
    summaries = with_timed(summaries, timing.arms)
    verdict = in_short({claim.key: claim for claim in judge(Network(name, runs, summaries))})
    return with_metric(verdict, display_name(metric))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns mean and sample standard deviation of the finite values; 0 spread for a single one."""
    there = [value for value in values if math.isfinite(value)]
    mean = float(np.mean(there)) if there else None
    std = float(np.std(there, ddof=1)) if len(there) > 1 else (0.0 if there else None)
    return {"mean": mean, "std": std, "values": json_safe(list(values))}


def curves_csv(runs: Sequence[Run]) -> str:
    """Returns one line for each epoch of each run; no name in it is a formula to a spreadsheet."""
    measures = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    which = ("data", "network", "depth", "batch_size", "arm", "learning_rate", "seed", "epoch", "step")
    writer.writerow((*which, *measures))
    for run in runs:
        for row in run.epochs:
            names = (_no_formula(run.data), _no_formula(run.network), run.depth, run.batch_size)
            numbers = (
                _no_formula(run.arm),
                run.learning_rate,
                run.seed,
                row.epoch,
                row.epoch * run.steps_per_epoch,
            )
            writer.writerow((*names, *numbers, *(json_safe(getattr(row, measure)) for measure in measures)))
    return text.getvalue()


def _no_formula(name: str) -> str:
    """Returns a name in one line, behind an apostrophe where a spreadsheet would compute it (OWASP)."""
    line = in_one_line(name)
    return f"'{line}" if line.lstrip().startswith(("=", "+", "-", "@")) else line


def _at_best_rate(runs: Sequence[Run], timing: ArmTiming, metric: str) -> dict[str, Any]:
    """Returns an arm's measures at the rate of its highest mean accuracy; a diverged run counts as 0.

    Other metrics may fall below 0: there the rates at which the fewest runs diverge come first.
    """
    by_rate = {
        rate: [run for run in runs if run.learning_rate == rate]
        for rate in sorted({run.learning_rate for run in runs})
    }

    def score(rate: float) -> tuple[int, float]:
        runs = by_rate[rate]
        finished = 0 if metric == "accuracy" else sum(not run.diverged for run in runs)
        return finished, float(np.mean([np.nan_to_num(run.accuracy) for run in runs]))

    best = max(by_rate, key=score)
    runs = by_rate[best]
    ends = [_NO_EPOCH if run.diverged else run.epochs[-1] for run in runs]
    steps = spread([NAN if run.diverged else run.steps_to_target for run in runs])
    seconds = timing.seconds_per_step
    return {
        "best_learning_rate": best,
        "diverged": sum(run.diverged for run in runs),
        "test_accuracy": spread([end.test_accuracy for end in ends]),
        "train_accuracy": spread([end.train_accuracy for end in ends]),
        "test_loss": spread([end.test_loss for end in ends]),
        "generalization_gap": spread([end.train_accuracy - end.test_accuracy for end in ends]),
        "steps_to_target": {**steps, "reached": sum(value is not None for value in steps["values"])},
        "seconds_per_step": {**spread(seconds), "median": float(np.median(seconds))},
        "bytes_kept_for_backward": spread([run.bytes_kept_for_backward for run in runs]),
        "parameters": spread([run.parameters for run in runs]),
    }


def _provenance(options: StudyOptions, data: Mapping[str, Dataset], framework: Framework) -> dict[str, Any]:
    recipe, epochs = (
        options.recipe(options.data[0]),
        {name: options.recipe(name).epochs for name in options.data},
    )
    packages = {**dict(framework.versions), "numpy": version("numpy")}
    return {
        "command": options.command(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **framework.describe(),
        "versions": {"python": platform.python_version(), **packages, "batchnorm": __version__},
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_count": usable_cores(),
        **({} if options.scheduler is None else {"executor": _ON_A_CLUSTER}),
        "device": "cpu",
        "threads": {"training": 1, "timing": 1},
        "workers": options.jobs or (_ALL_THREADS if options.scheduler else options.workers),
        "data": [
            {**one.describe(), "baselines": dict(source_named(name).baselines)} for name, one in data.items()
        ],
        "networks": list(dict.fromkeys(setting.network_name for setting in options.settings())),
        "arms": list(dict.fromkeys(arm for name in options.data for arm in options.arms_on(name))),
        "learning_rates": sorted({rate for name in options.data for rate in options.rates_on(name)}),
        "seeds": list(range(options.seeds)),
        "epochs": next(iter(epochs.values())) if len(set(epochs.values())) == 1 else epochs,
        "batch_sizes": list(dict.fromkeys(setting.batch_size for setting in options.settings())),
        "loss": display_name(options.loss),
        "metric": display_name(recipe.metric),
        "target_accuracy": options.target_accuracy,
        "train_accuracy": "on at most 1,000 training examples, the same ones in every run",
        "optimizer": recipe.describe_optimizer(),
        "penalties": {"l1": f"{L1_STRENGTH:g} * sum |w|", "l2": f"{L2_STRENGTH:g} * sum w^2"},
        "best_rate": "highest mean held-out accuracy after the last epoch, on the examples that are reported",
        "std": "sample standard deviation over seeds; of seconds_per_step, over blocks of steps",
    }
