"""What a diagnosis finds in networks that were trained well: the examples, and the study's own networks."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import batchnorm
from batchnorm.doctor.findings import Diagnosis
from batchnorm.studies.arms import parse_arm
from batchnorm.studies.data import Dataset, load_data
from batchnorm.studies.learner_torch import make_learner, session
from batchnorm.studies.options import StudyOptions
from batchnorm.studies.padding import Padded
from batchnorm.studies.settings import Recipe, Setting

from .progress import progress
from .tables import Row, Rows, table_of

EXAMPLES = Path(__file__).parent.parent / "examples"
DATA = ("digits", "languages", "vowels")
SAMPLES, BATCH, RATE, EPOCHS = 512, 32, 1e-3, 5
FEWER_EPOCHS = {"characters": 1}  # of languages, which are many and long


def measure(quick: bool = False) -> Rows:
    """Return a row per network: how well it does, and what is found in it on its own training data."""
    options = StudyOptions(data=DATA[2:] if quick else DATA)
    settings = [(setting, arm) for setting in options.settings() for arm in _arms(setting)]
    rows = [] if quick else [_torch_example(), _keras_example()]
    loaded = {name: load_data(name) for name in options.data}
    for setting, arm in progress(settings, "networks of the study"):
        epochs = 2 if quick else FEWER_EPOCHS.get(setting.network, EPOCHS)
        rows.append(_trained(setting, arm, loaded[setting.data], epochs))
    return rows


def _arms(setting: Setting) -> tuple[str, ...]:
    unmasked = ("batchnorm:unmasked",) if setting.data != "digits" else ()
    return ("batchnorm", "stock", *unmasked)


def _trained(setting: Setting, name: str, data: Dataset, epochs: int) -> Row:
    """Train a network of the study as it does, and diagnose it on batches as in training."""
    arm, recipe = parse_arm(name), Recipe(epochs=epochs)
    with session():
        learner = make_learner(setting, recipe, arm, data, 0, RATE, False)
        for epoch in range(epochs):
            order = learner.permutation(len(data.x_train), epoch)
            for start in range(0, len(order) - BATCH + 1, BATCH):
                part = order[start : start + BATCH]
                learner.step(data.train[part], data.y_train[part])
        model = learner.model.eval()
        order = learner.permutation(len(data.x_train), epochs)[:SAMPLES]
        parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        batches = [(_as_tensors(data.train[part]), torch.from_numpy(data.y_train[part])) for part in parts]

        def forward(model: torch.nn.Module, batch: Any) -> object:
            x = batch[0]
            if not isinstance(x, dict):
                return model(x)
            values, lengths = x["x"], x["lengths"]
            masked = batchnorm.mask(model, lengths=lengths, size=values.shape[1]) if arm.is_masked else None
            with masked or contextlib.nullcontext():
                return model(values, lengths)

        found = batchnorm.diagnose(model, batches, forward=forward)
    return _row(f"{setting.data}, {setting.network_name}", name, found)


def _as_tensors(x: Any) -> object:
    if isinstance(x, Padded):
        return {"x": torch.from_numpy(x.values), "lengths": torch.from_numpy(x.lengths)}
    return torch.from_numpy(x)


def _torch_example() -> Row:
    of = _run("torch_digits.py")
    order = torch.randperm(len(of["x_train"]), generator=torch.Generator().manual_seed(0))
    parts = order[:SAMPLES].split(BATCH)
    batches = [(of["x_train"][part], of["y_train"][part]) for part in parts]
    return _row(
        "examples/torch_digits.py",
        "batchnorm",
        batchnorm.diagnose(of["model"], batches, optimizer=of["optimizer"]),
    )


def _keras_example() -> Row:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    of = _run("keras_digits.py")
    data = of["x_train"][:SAMPLES], of["y_train"][:SAMPLES]
    return _row("examples/keras_digits.py", "batchnorm", batchnorm.keras.diagnose(of["model"], data))


def _run(name: str) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        return runpy.run_path(str(EXAMPLES / name))


def _row(network: str, arm: str, found: Diagnosis) -> Row:
    return {
        "network": network,
        "arm": arm,
        "norms": found.norms,
        "scores": dict(found.scores),
        "findings": [
            {"severity": of.severity, "check": of.check, "layer": of.layer, "message": of.message}
            for of in found.findings
        ],
    }


def trained_table(rows: Rows) -> str:
    """Accuracy by running and by population statistics, and findings, per network."""
    return table_of(
        {
            "network": row["network"],
            "arm": f"`{row['arm']}`",
            "norms": str(row["norms"]),
            "accuracy by running / population statistics": " / ".join(
                f"{row['scores'][name]:.1%}" for name in ("running", "population")
            ),
            "serious": _listed(row, "serious"),
            "likely": _listed(row, "likely"),
            "note": _listed(row, "note"),
        }
        for row in rows
    )


def _listed(row: Row, severity: str) -> str:
    found: Iterable[str] = dict.fromkeys(of["check"] for of in row["findings"] if of["severity"] == severity)
    return ", ".join(found)
