"""Plausible results of a study, made up from a formula: the same for the same arguments."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ARMS = ("none", "batchnorm", "dropout", "l1", "l2", "layernorm", "batchnorm+dropout")
RATES = (1e-4, 1e-3, 1e-2)
TARGET = 0.9
STEPS_PER_EPOCH = 125
BATCH = 32

Record = dict[str, Any]


def record(
    *,
    network: str = "mlp",
    arm: str = "batchnorm",
    rate: float = 1e-3,
    seed: int = 0,
    accuracy: float = 0.95,
    steps: float | None = 200,
    epochs: int = 4,
    layers: int = 2,
    gradient_ratio: float = 0.5,
    drift: float = 0.1,
    diverged: bool = False,
    depth: int | None = None,
    batch_size: int = BATCH,
) -> Record:
    """One run whose held-out accuracy ends at `accuracy`."""
    noise = random.Random(repr((network, arm, rate, seed)))
    recorded = list(range(0, epochs * STEPS_PER_EPOCH, STEPS_PER_EPOCH // 5))
    names = [f"layer{i + 1}" for i in range(layers)]
    last = 1.0 if diverged else epochs
    curve = [
        accuracy * (1 - 0.6 * math.exp(-1.4 * (epoch - 1)) * (epoch < epochs))
        for epoch in range(1, epochs + 1)
    ]
    return {
        "data": "digits",
        "network": network,
        "depth": depth,
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "status": "diverged" if diverged else "finished",
        "epochs": [
            {
                "epoch": epoch,
                "train_loss": None if diverged else 2.3 * math.exp(-epoch) + 0.05 + noise.random() * 0.02,
                "train_accuracy": None if diverged else min(1.0, curve[epoch - 1] + 0.02),
                "test_loss": None if diverged else 2.3 * math.exp(-epoch) + 0.15,
                "test_accuracy": None if diverged else curve[epoch - 1],
            }
            for epoch in range(1, int(last) + 1)
        ],
        "step_loss": [2.3, 1.9],
        "steps_per_epoch": STEPS_PER_EPOCH,
        "batch_size": batch_size,
        "target_accuracy": TARGET,
        "steps_to_target": None if diverged else steps,
        "parameters": 50_890,
        "bytes_kept_for_backward": 120_000,
        "gradient_norm": {
            "steps": recorded,
            "layers": {
                name: [
                    None
                    if diverged
                    else gradient_ratio ** (1 - i / max(layers - 1, 1)) * (0.8 + 0.4 * noise.random())
                    for _ in recorded
                ]
                for i, name in enumerate(names)
            },
        },
        "input_drift": {
            "steps": recorded,
            "layers": {
                name: {
                    "mean": [drift * i * math.tanh(step / 200) + 0.01 * noise.random() for step in recorded],
                    "std": [1 + drift * i * math.tanh(step / 200) for step in recorded],
                }
                for i, name in enumerate(names)
            },
        },
        "test_time_statistics": (
            {"batch": accuracy - 0.01, "running": accuracy, "calibrated": accuracy + 0.001}
            if arm.startswith("batchnorm") and not diverged
            else None
        ),
    }


def results(runs: Sequence[Record], **provenance: object) -> dict[str, Any]:
    """A whole `results.json` around these runs."""
    networks: dict[str, dict[str, Any]] = {}
    for network in dict.fromkeys(run["network"] for run in runs):
        ours = [run for run in runs if run["network"] == network]
        networks[network] = {
            arm: _summary(arm, [run for run in ours if run["arm"] == arm])
            for arm in dict.fromkeys(run["arm"] for run in ours)
        }
    first = next(iter(networks.values()), {})
    return {
        "arms": {
            arm: {name: value for name, value in fields.items() if isinstance(value, dict)}
            for arm, fields in first.items()
        },
        "provenance": {
            "command": "batchnorm study --network mlp,deep",
            "date": "2026-01-02T03:04:05+00:00",
            "versions": {"batchnorm": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
            "data": [
                {"name": "digits", "train": 4000, "held_out": 1000, "classes": 10, "shape": [1, 28, 28]}
            ],
            "epochs": 4,
            "batch_sizes": [BATCH],
            "seeds": [0, 1, 2],
            "learning_rates": list(RATES),
            "target_accuracy": TARGET,
            "threads": 1,
            **provenance,
        },
        "networks": networks,
        "timing": {},
        "runs": list(runs),
    }


def usual(
    arms: Sequence[str] = ARMS, seeds: int = 3, networks: Sequence[str] = ("mlp", "deep")
) -> dict[str, Any]:
    """Two networks as one would expect them: a small one, and a deep one that needs normalization."""
    runs = []
    for arm in arms:
        helped = arm.startswith("batchnorm") or arm == "layernorm"
        for rate in RATES:
            for seed in range(seeds):
                noise = random.Random(f"{arm}{rate}{seed}").uniform(-1, 1)
                at = {"arm": arm, "rate": rate, "seed": seed}
                small = 0.94 + 0.01 * helped - 0.1 * abs(math.log10(rate) + 3) + 0.004 * noise
                steps = (140 if helped else 320) * (1 + 3 * (rate < 1e-3)) + round(10 * noise)
                runs.append(record(network="mlp", accuracy=small, steps=steps if steps < 500 else None, **at))
                deep = 0.93 + 0.005 * noise if helped else 0.114
                runs.append(
                    record(
                        network="deep",
                        accuracy=deep,
                        steps=260 + round(10 * noise) if helped else None,
                        layers=9,
                        gradient_ratio=0.6 if helped else 1e-5,
                        drift=0.05 if helped else 0.2,
                        diverged=arm == "l1" and rate == 1e-2 and seed == 0,
                        **at,
                    )
                )
    return results([run for run in runs if run["network"] in networks])


def write(folder: Path, content: Mapping[str, Any]) -> Path:
    """Put the results where a report looks for them; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def each_seed(make: Callable[[int], Record], seeds: int = 3) -> list[Record]:
    """The same run once for each seed."""
    return [make(seed) for seed in range(seeds)]


def _summary(arm: str, runs: Sequence[Record]) -> dict[str, Any]:
    finished = [run for run in runs if run["status"] == "finished"]
    rates = sorted({run["learning_rate"] for run in finished})

    def score(rate: float) -> float:
        ends = [run["epochs"][-1]["test_accuracy"] for run in finished if run["learning_rate"] == rate]
        return sum(ends) / len(ends)

    best = max(rates, key=score) if rates else None
    chosen = [run for run in finished if run["learning_rate"] == best]
    ends = [run["epochs"][-1] for run in chosen]
    reached = [run["steps_to_target"] for run in chosen]
    slow = 1.4 if arm.startswith("batchnorm") else 1.0
    return {
        "best_learning_rate": best,
        "test_accuracy": _spread([end["test_accuracy"] for end in ends]),
        "train_accuracy": _spread([end["train_accuracy"] for end in ends]),
        "test_loss": _spread([end["test_loss"] for end in ends]),
        "generalization_gap": _spread([end["train_accuracy"] - end["test_accuracy"] for end in ends]),
        "steps_to_target": {**_spread(reached), "reached": sum(steps is not None for steps in reached)},
        "seconds_per_step": _spread([4.1e-4 * slow, 4.2e-4 * slow, 4.0e-4 * slow]),
        "bytes_kept_for_backward": _spread([120_000 * slow]),
        "parameters": 50_890,
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    finite = [value for value in values if value is not None]
    mean = sum(finite) / len(finite) if finite else None
    std = (
        math.sqrt(sum((value - mean) ** 2 for value in finite) / (len(finite) - 1))
        if mean is not None and len(finite) > 1
        else None
    )
    return {"mean": mean, "std": std, "values": list(values)}
