"""batchnorm.integrations.lightning in Lightning's own Trainer, on a CPU; examples/lightning_digits.py."""

from __future__ import annotations

import csv
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm
from batchnorm.errors import DataError, OptionError
from tests.support.programs import EXAMPLES

with pytest.MonkeyPatch.context() as patched:
    # TensorBoard looks for this module before it imports TensorFlow, which would take ten seconds.
    patched.setitem(sys.modules, "tensorboard.compat.notf", ModuleType("notf"))
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.tensorboard import SummaryWriter

    from batchnorm.integrations.lightning import Calibrate, Doctor, Freeze, Monitor

pytestmark = [
    pytest.mark.xdist_group("training libraries"),
    pytest.mark.filterwarnings("ignore"),  # Lightning warns of few workers, few batches and a missing logger
]
X, Y = torch.randn(48, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1, torch.arange(48) % 4


class Module(pl.LightningModule):
    """A backbone and a head, each with a norm; `told` is called as a validation begins, behind callbacks."""

    def __init__(self, told: Callable[[Module], None] = lambda _: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 4), batchnorm.BatchNorm1d(4))
        self.told = told

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.backbone(x))
        return found

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:  # noqa: ARG002
        self(batch[0])

    def on_validation_start(self) -> None:
        self.told(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        learning = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(learning, lr=0.1, momentum=0.9, weight_decay=0.01)


def _data(batch_size: int = 12) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=batch_size)


def _fit(module: Module, callbacks: list[pl.Callback], folder: Path, epochs: int = 2, **options: Any) -> Any:
    options = {"logger": False, "num_sanity_val_steps": 0, "enable_checkpointing": False} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, _data(), _data())
    return trainer


def _is_calibrated(state: dict[str, Tensor]) -> bool:
    """Whether the first norm's running statistics are those of all data by these weights."""
    weight, bias = state["backbone.0.weight"].double(), state["backbone.0.bias"].double()
    received = X.double() @ weight.T + bias
    mean, var = state["backbone.1.running_mean"], state["backbone.1.running_var"]
    return torch.allclose(mean.double(), received.mean(0), rtol=1e-5, atol=1e-5) and torch.allclose(
        var.double(), received.var(0), rtol=1e-5
    )


def test_validations_and_checkpoints_have_statistics_of_their_weights(tmp_path: Path) -> None:
    """In the midst of an epoch, and of weights alone, too; the sanity check calibrates nothing."""
    seen: list[bool] = []
    module = Module(lambda module: seen.append(_is_calibrated(module.state_dict())))
    saves = [
        ModelCheckpoint(tmp_path / "steps", every_n_train_steps=3, save_top_k=-1),
        ModelCheckpoint(tmp_path / "weights", save_weights_only=True),
    ]
    calibrate = Calibrate(_data(16))
    _fit(
        module,
        [*saves, calibrate],
        tmp_path,
        enable_checkpointing=True,
        val_check_interval=2,
        num_sanity_val_steps=1,
    )
    assert seen == [False, True, True, True, True]
    files = [*(tmp_path / "steps").iterdir(), *(tmp_path / "weights").iterdir()]
    assert len(files) == 3
    for file in files:
        assert _is_calibrated(torch.load(file, weights_only=False)["state_dict"]), file.name
    assert calibrate.report is not None
    assert calibrate.report.samples == 48


def test_weights_alone_are_calibrated_without_a_validation(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path / "weights", save_weights_only=True)
    _fit(Module(), [Calibrate([X])], tmp_path, limit_val_batches=0, enable_checkpointing=False)
    _fit(Module(), [save, Calibrate([X])], tmp_path, epochs=1, limit_val_batches=0, enable_checkpointing=True)
    (file,) = (tmp_path / "weights").iterdir()
    assert _is_calibrated(torch.load(file, weights_only=False)["state_dict"])


@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_row_53_frozen_norms_stay_frozen_through_backbone_finetuning(
    first: bool, parameters: bool, tmp_path: Path
) -> None:
    """Row 53: Lightning unfreezes the backbone after an epoch; in any order of the callbacks."""
    module = Module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callbacks = [Freeze("backbone", parameters=parameters), BackboneFinetuning(1)]
    _fit(module, callbacks if first else callbacks[::-1], tmp_path)
    after = module.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "backbone.0.weight" in changed
    assert not changed & {"backbone.1.running_mean", "backbone.1.running_var"}
    assert (not changed & {"backbone.1.weight", "backbone.1.bias"}) is parameters
    assert {"head.1.running_mean", "head.1.weight"} <= changed


def test_without_the_callback_statistics_move_behind_backbone_finetuning(tmp_path: Path) -> None:
    """The pain: Lightning's own freezing ends with its unfreezing."""
    module = Module()
    before = module.backbone[1].running_mean.clone()
    _fit(module, [BackboneFinetuning(1)], tmp_path)
    assert not torch.equal(module.backbone[1].running_mean, before)


def test_rows_go_to_the_loggers_of_the_trainer_or_to_a_summary_writer(tmp_path: Path) -> None:
    """Every third batch, at the trainer's step of two batches; the row of a `monitor` in a plain loop."""
    module, logger = Module(), CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    rows: dict[int, dict[str, float]] = {}
    with SummaryWriter(str(tmp_path / "board")) as writer:
        monitors = [Monitor(every=3), Monitor(lambda row, step: rows.update({step: row}), every=3)]
        callbacks = [*monitors, Monitor(writer, every=3)]
        _fit(module, callbacks, tmp_path, epochs=1, logger=logger, accumulate_grad_batches=2)
    assert list(rows) == [0, 1]
    logged = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    assert [int(line["step"]) for line in logged] == [0, 1]
    for line, row in zip(logged, rows.values(), strict=True):
        assert {name: float(line[name]) for name in row} == pytest.approx(row)
    assert list((tmp_path / "board").glob("events*"))
    plain = Module()
    expected: list[dict[str, float]] = []
    with batchnorm.monitor(plain, lambda row, _: expected.append(row)):
        nn.functional.cross_entropy(plain(X[:12]), Y[:12]).div(2).backward()
    assert rows[0] == pytest.approx(expected[0], rel=1e-5)
    assert not any(norm._forward_pre_hooks for norm in module.modules())


def test_the_doctor_sees_the_optimizer_and_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor = Doctor(_data(), ignore=["bias-before"])
    _fit(Module(), [doctor], tmp_path, epochs=1, limit_train_batches=1)
    assert doctor.diagnosis is not None
    checks = {finding.check for finding in doctor.diagnosis.findings}
    assert "weight-decay" in checks
    assert "bias-before" not in checks
    assert doctor.diagnosis.scores["running"] > 0
    assert doctor.diagnosis.title in capsys.readouterr().out


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a list_iterator is used up by one calibration"):
        Calibrate(iter([X]))
    with pytest.raises(OptionError, match="every is a number of steps"):
        Monitor(every=0)
    with pytest.raises(OptionError, match="Monitor has nowhere to log to"):
        _fit(Module(), [Monitor()], tmp_path)
    module = batchnorm.freeze(Module())
    before = module.head[0].weight.clone()
    with pytest.raises(OptionError, match="Module has no batch normalization that is not frozen"):
        _fit(module, [Calibrate([X])], tmp_path)
    assert torch.equal(module.head[0].weight, before)


def test_the_example_learns_logs_and_saves_calibrated_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = runpy.run_path(str(EXAMPLES / "lightning_digits.py"))
    printed = re.search(r"held-out accuracy: ([\d.]+)%", capsys.readouterr().out)
    assert printed
    assert float(printed[1]) > 85
    (log,) = tmp_path.glob("runs/**/metrics.csv")
    assert [line["step"] for line in csv.DictReader(log.read_text().splitlines())] == ["0", "50", "100"]
    assert "bn/net.1/weight_grad_norm" in log.read_text()
    (saved,) = tmp_path.glob("runs/**/*.ckpt")
    state = torch.load(saved, weights_only=False)["state_dict"]
    received = nn.functional.linear(ran["data"].tensors[0], state["net.0.weight"], state["net.0.bias"])
    torch.testing.assert_close(state["net.1.running_mean"], received.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state["net.1.running_var"], received.var(0), rtol=1e-4, atol=1e-4)
