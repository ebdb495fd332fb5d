"""batchnorm.integrations.transformers in the Trainer of transformers, on a CPU, and its example."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import batchnorm
from batchnorm.errors import DataError, OptionError
from batchnorm.integrations.transformers import Calibrate, Doctor, Freeze, Monitor
from tests.support.programs import EXAMPLES

pytestmark = [
    pytest.mark.xdist_group("training libraries"),
    pytest.mark.filterwarnings("ignore"),  # transformers warns of pinned memory without a GPU
]
X, Y = torch.randn(48, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1, torch.arange(48) % 4
SAMPLES = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
BATCHES = [{"x": X, "labels": Y}]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 4), batchnorm.BatchNorm1d(4))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.backbone(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Told(TrainerCallback):
    """Notes behind each evaluation whether the model is calibrated; makes everything learn, in each epoch."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_evaluate(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.seen.append(_is_calibrated(model.state_dict()))

    def on_epoch_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        model.requires_grad_(True)


def _is_calibrated(state: dict[str, Tensor]) -> bool:
    """Whether the first norm's running statistics are those of all data by these weights."""
    received = nn.functional.linear(
        X.double(), state["backbone.0.weight"].double(), state["backbone.0.bias"].double()
    )
    mean, var = (state[f"backbone.1.running_{what}"].double() for what in ("mean", "var"))
    return torch.allclose(mean, received.mean(0), rtol=1e-5, atol=1e-5) and torch.allclose(
        var, received.var(0), rtol=1e-5
    )


def _train(net: Net, callbacks: list[TrainerCallback], folder: Path, **options: Any) -> Trainer:
    options = {"num_train_epochs": 2, "eval_strategy": "no", "save_strategy": "no"} | options
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=12,
        learning_rate=0.05,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(net, arguments, train_dataset=SAMPLES, eval_dataset=SAMPLES, callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluations_and_checkpoints_have_statistics_of_their_weights(strategy: str, tmp_path: Path) -> None:
    net, told, calibrate = Net(), Told(), Calibrate(BATCHES)
    options = {"eval_strategy": strategy, "save_strategy": strategy, "eval_steps": 3, "save_steps": 4}
    _train(net, [told, calibrate], tmp_path, **options)
    saved = sorted(tmp_path.glob("checkpoint-*/model.safetensors"))
    assert len(saved) == 2  # at steps 4 and 8, which are the ends of the epochs
    assert len(told.seen) == (3 if strategy == "steps" else 2)  # at steps 3, 6 and the last, 8
    assert all(told.seen)
    assert all(_is_calibrated(load_file(file)) for file in saved)
    assert calibrate.report is not None
    assert calibrate.report.samples == 48


def test_the_model_is_calibrated_in_the_end_and_the_best_one_stays_so(tmp_path: Path) -> None:
    net, calibrate = Net(), Calibrate([(X, Y)], forward=lambda model, batch: model(*batch), samples=48)
    _train(net, [calibrate], tmp_path / "last")
    assert _is_calibrated(net.state_dict())
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    net = Net()
    _train(net, [Calibrate(BATCHES)], tmp_path, eval_strategy="epoch", save_strategy="epoch", **best)
    assert _is_calibrated(net.state_dict())


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("parameters", [False, True])
def test_frozen_norms_stay_frozen(parameters: bool, added: bool, tmp_path: Path) -> None:
    """Through a callback that makes everything learn; added to a Trainer that is there already, too."""
    net, freeze = Net(), Freeze("backbone", parameters=parameters)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    if added:
        arguments = TrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=3
        )
        trainer = Trainer(net, arguments, train_dataset=SAMPLES, callbacks=[Told()])
        trainer.add_callback(freeze)
        trainer.train()
    else:
        _train(net, [freeze, Told()], tmp_path)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert not changed & {"backbone.1.running_mean", "backbone.1.running_var"}
    assert (not changed & {"backbone.1.weight", "backbone.1.bias"}) is parameters
    assert {"backbone.0.weight", "head.1.running_mean", "head.1.weight"} <= changed


def test_rows_have_the_micro_batches_of_an_optimizer_step(tmp_path: Path) -> None:
    """In the Trainer's own history, or where `log` says; gradients are those before the optimizer's step."""
    rows: dict[int, dict[str, float]] = {}
    monitors = [Monitor(every=2), Monitor(lambda row, step: rows.update({step: row}), every=2)]
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "data_seed": 0, "max_grad_norm": 0.0}
    trainer = _train(Net(), monitors, tmp_path, **options)
    assert list(rows) == [0, 2]
    assert rows[0]["bn/backbone.1/values_per_channel"] == 24
    assert rows[0]["bn/head.1/bias_grad_norm"] > 0
    history = [entry for entry in trainer.state.log_history if "bn/head.1/std_ratio" in entry]
    assert history == [{**row, "step": step} for step, row in rows.items()]


@pytest.mark.filterwarnings("error:monitor")
def test_a_model_that_the_trainer_compiles_is_observed(tmp_path: Path) -> None:
    rows: dict[int, dict[str, float]] = {}
    monitor = Monitor(lambda row, step: rows.update({step: row}), every=2)
    options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 4}
    _train(Net(), [monitor], tmp_path, **options)
    assert list(rows) == [0, 2]
    for row in rows.values():
        assert row["bn/backbone.1/values_per_channel"] == 12
        assert row["bn/backbone.1/weight_grad_norm"] > 0


def test_the_doctor_sees_the_optimizer_and_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor = Doctor(
        [(X, Y)], forward=lambda model, batch: model(batch[0], batch[1])["logits"], ignore=["bias-before"]
    )
    _train(Net(), [doctor], tmp_path, max_steps=1, optim="adamw_torch", weight_decay=0.1)
    assert doctor.diagnosis is not None
    checks = {finding.check for finding in doctor.diagnosis.findings}
    assert "never-updated" in checks
    assert "bias-before" not in checks
    assert doctor.diagnosis.cost.samples == 48
    assert doctor.diagnosis.title in capsys.readouterr().out


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a list_iterator is used up by one calibration"):
        Calibrate(iter(BATCHES))
    with pytest.raises(OptionError, match="every is a number of steps"):
        Monitor(every=-1)
    net = batchnorm.freeze(Net())
    before = net.head[0].weight.clone()
    with pytest.raises(OptionError, match="Net has no batch normalization that is not frozen"):
        _train(net, [Calibrate(BATCHES)], tmp_path)
    assert torch.equal(net.head[0].weight, before)


def test_the_example_learns_and_saves_calibrated_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = runpy.run_path(str(EXAMPLES / "transformers_digits.py"))
    printed = re.search(r"held-out accuracy: ([\d.]+)%", capsys.readouterr().out)
    assert printed
    assert float(printed[1]) > 85
    (saved,) = tmp_path.glob("runs/checkpoint-*/model.safetensors")
    state = load_file(saved)
    received = nn.functional.linear(ran["x"].flatten(1), state["0.weight"], state["0.bias"])
    torch.testing.assert_close(state["1.running_mean"], received.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state["1.running_var"], received.var(0), rtol=1e-4, atol=1e-4)
    steps = [e["step"] for e in ran["trainer"].state.log_history if "bn/1/mean_distance" in e]
    assert steps == [0, 50, 100]
