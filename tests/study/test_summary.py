from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchnorm.errors import in_one_line
from batchnorm.studies.data import Dataset
from batchnorm.studies.frameworks import Framework
from batchnorm.studies.json_files import convert, json_safe, write_json
from batchnorm.studies.options import StudyOptions
from batchnorm.studies.records import ArmTiming, Run, Timing
from batchnorm.studies.summary import curves_csv, spread, summarize

OPTIONS = StudyOptions(
    data=("digits",),
    networks=("mlp", "/home/someone/net.py:build"),
    arms=("none", "batchnorm"),
    learning_rates=(0.1, 0.01),
    seeds=2,
)
TORCH = Framework("torch", None, (("torch", "2.13.0"),))
SECONDS = {"none": ArmTiming([1.0, 2.0, 9.0], 0.1), "batchnorm": ArmTiming([3.0], 0.1)}
TIMING = {setting: Timing(SECONDS) for setting in OPTIONS.settings()}
NETWORKS = ("mlp", "net.py:build")


def record(network: str, arm: str, rate: float, seed: int, accuracy: float | None) -> Run:
    row = {"train_loss": 0.1, "train_accuracy": 1.0, "test_loss": 0.5}
    final = [] if accuracy is None else [{"epoch": 1, **row, "test_accuracy": accuracy}]
    whole = {
        "data": "digits",
        "network": network,
        "depth": None,
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "status": "diverged" if accuracy is None else "finished",
        "epochs": final,
        "steps_per_epoch": 7,
        "steps_to_target": 14 if seed == 0 and accuracy else None,
        "bytes_kept_for_backward": 100,
        "parameters": 5,
        "step_loss": [],
        "batch_size": 32,
        "target_accuracy": 0.9,
        "target_checked_every": 1,
    }
    return convert(whole, Run, exact=False)


def summary() -> dict[str, Any]:
    x, y = np.zeros((4, 2), np.float32), np.array([0, 1, 0, 1])
    accuracies = {("none", 0.1): (0.99, None), ("none", 0.01): (0.6, 0.8)}
    records = [
        record(network, arm, rate, seed, accuracies.get((arm, rate), (0.9, 0.9))[seed])
        for network in NETWORKS
        for arm in OPTIONS.arms
        for rate in OPTIONS.learning_rates
        for seed in (0, 1)
    ]
    results = json_safe(
        summarize(OPTIONS, {"digits": Dataset("own", "here", x, y, x, y)}, records, TIMING, TORCH)
    )
    assert isinstance(results, dict)
    return results


def test_each_arm_stands_at_its_best_rate_and_divergence_counts_as_zero() -> None:
    none = summary()["networks"]["mlp"]["none"]
    assert none["best_learning_rate"] == 0.01
    assert none["test_accuracy"] == {
        "mean": pytest.approx(0.7),
        "std": pytest.approx(0.02**0.5),
        "values": [0.6, 0.8],
    }
    assert none["generalization_gap"]["values"] == [pytest.approx(0.4), pytest.approx(0.2)]
    assert summary()["networks"]["mlp"]["batchnorm"]["best_learning_rate"] == 0.01  # a tie: the smaller one


def test_a_target_that_some_runs_miss_keeps_its_nulls() -> None:
    steps = summary()["arms"]["none"]["steps_to_target"]
    assert steps == {"mean": 14.0, "std": 0.0, "values": [14, None], "reached": 1}


def test_arms_are_those_of_the_first_network_with_every_metric_alike() -> None:
    results = summary()
    wanted = {"test_accuracy", "steps_to_target", "seconds_per_step", "bytes_kept_for_backward"}
    for arm, measured in results["arms"].items():
        assert measured.keys() >= wanted
        for metric, value in measured.items():
            assert {"mean", "std", "values"} <= value.keys()
            assert value == results["networks"]["mlp"][arm][metric]
    assert results["arms"]["none"]["seconds_per_step"]["median"] == 2.0


def test_diverged_runs_are_counted_and_give_no_numbers() -> None:
    assert spread([math.nan, math.nan]) == {"mean": None, "std": None, "values": [None, None]}
    assert spread([3.0]) == {"mean": 3.0, "std": 0.0, "values": [3.0]}


def test_provenance_names_no_folder_and_every_choice() -> None:
    results = summary()
    assert "someone" not in json.dumps(results)
    assert "--network mlp,net.py:build" in results["provenance"]["command"]
    assert "--learning-rate 0.1,0.01" in results["provenance"]["command"]
    assert results["provenance"]["threads"] == {"training": 1, "timing": 1}
    assert results["provenance"]["data"][0]["train"] == 4
    assert all("settings" not in run for run in results["runs"])


def test_curves_have_a_line_for_each_epoch() -> None:
    lines = list(csv.DictReader(curves_csv([record("a,b", "none", 0.1, 3, 0.5)]).splitlines()))
    assert len(lines) == 1
    assert (lines[0]["network"], lines[0]["step"], lines[0]["test_accuracy"]) == ("a,b", "7", "0.5")


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [float("nan"), (float("inf"), 1.5)], "y": {"z": -float("inf")}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, [None, 1.5]], "y": {"z": None}}
    assert json_safe("nan") == "nan"


@pytest.mark.parametrize("name", ["=1+1.py:f", "+x.py:f", "-x.py:f", "@x.py:f", " =x.py:f", "\r\n=x\ty.py:f"])
def test_no_name_is_a_formula_to_a_spreadsheet(name: str) -> None:
    (row,) = csv.DictReader(io.StringIO(curves_csv([record(name, "none", 1e-3, 0, 0.5)]), newline=""))
    assert (row["network"], row["learning_rate"]) == ("'" + in_one_line(name), "0.001")
