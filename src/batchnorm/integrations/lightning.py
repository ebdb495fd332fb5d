"""Callbacks for Lightning's Trainer: calibrate, freeze, monitor and diagnose batch normalizations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from batchnorm.doctor.findings import Diagnosis
from batchnorm.errors import OptionError
from batchnorm.loggers import Log, check_every, log_function
from batchnorm.models.calibrate import calibrate, norms_to_calibrate
from batchnorm.models.calibration.batches import Forward
from batchnorm.models.diagnose import diagnose
from batchnorm.models.freeze import affine_parameters, freeze, hold
from batchnorm.models.monitor import StepObserver
from batchnorm.statistics.calibration import CalibrationReport, check_repeatable

Data = Iterable[object]


class Calibrate(Callback):
    """Calibrates the module before each validation of `fit` and before a checkpoint is saved.

    Validations and checkpoints then have statistics of their weights, and training goes on from these. A
    checkpoint of weights alone (`save_weights_only=True`) tells no callback: it is calibrated behind a
    validation and at the end of an epoch, not every n steps. Every process calls `batchnorm.calibrate`.

    Args:
        data: training samples, as `batchnorm.calibrate` takes them; not an iterator.
        forward: called as `forward(module, batch)` for batches of any other form.
        samples: stop after this many per calibration; None = all.

    Attributes:
        report: of the last calibration; None before the first.
    """

    def __init__(self, data: Data, *, forward: Forward | None = None, samples: int | None = None) -> None:
        check_repeatable(data)
        self.data, self.forward, self.samples = data, forward, samples
        self.report: CalibrationReport | None = None
        self._is_current = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        norms_to_calibrate(pl_module)  # refuses now what would be refused after an epoch

    def on_train_batch_start(self, *_: object) -> None:
        self._is_current = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._calibrate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            self._calibrate(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Any) -> None:
        self._calibrate(trainer, pl_module)  # in place: the checkpoint refers to the module's own buffers

    def _calibrate(self, trainer: Trainer, module: nn.Module) -> None:
        if not self._is_current:
            with trainer.precision_plugin.forward_context():
                self.report = calibrate(module, self.data, forward=self.forward, samples=self.samples)
            self._is_current = True


class Freeze(Callback):
    """Freezes batch normalizations for all of `fit`, through `BackboneFinetuning` too: `batchnorm.freeze`.

    Args:
        part: name of the submodule whose layers are frozen, such as "backbone"; "" = the whole module.
        parameters: stop weight and bias from learning too.
    """

    def __init__(self, part: str = "", *, parameters: bool = False) -> None:
        self.part, self.parameters = part, parameters
        self._held: list[nn.Parameter] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            part = freeze(pl_module.get_submodule(self.part), parameters=self.parameters)
            self._held = affine_parameters(part) if self.parameters else []

    def on_train_batch_start(self, *_: object) -> None:
        hold(self._held)  # an epoch begins with the finetuning of other callbacks


class Monitor(Callback):
    """Logs how each batch normalization does, at every `every`-th training batch: `batchnorm.monitor`.

    Args:
        log: as `batchnorm.monitor` takes it; None = the trainer's loggers. The step is `trainer.global_step`.
        every: number of batches from one row to the next.
    """

    def __init__(self, log: Log | None = None, *, every: int = 100) -> None:
        check_every(every)
        self._to, self.every, self.step = log, every, 0  # Lightning sets `log` of every callback
        self._observer: StepObserver | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logs = [log_function(log) for log in (trainer.loggers if self._to is None else [self._to])]
        if not logs:
            raise OptionError("Monitor has nowhere to log to: pass log=, or give the Trainer a logger")
        if trainer.is_global_zero:
            self._observer = StepObserver(pl_module, lambda row, step: [log(row, step) for log in logs])

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if self._observer is not None and self.step % self.every == 0:
            self._observer.attach(trainer.global_step)
        self.step += 1

    def on_train_batch_end(self, *_: object) -> None:
        if self._observer is not None:
            self._observer.log()

    def on_exception(self, *_: object) -> None:
        if self._observer is not None:
            self._observer.detach()


class Doctor(Callback):
    """Diagnoses the module when `fit` starts, and prints what it finds: `batchnorm.diagnose`.

    Args:
        data: samples of training, as `batchnorm.diagnose` takes them; None = the state of the module only.
        forward: called as `forward(module, batch)` for batches of any other form.
        ignore: checks to leave out.

    Attributes:
        diagnosis: what was found; None before `fit`.
    """

    def __init__(
        self, data: Data | None = None, *, forward: Forward | None = None, ignore: Iterable[str] = ()
    ) -> None:
        self.data, self.forward, self.ignore = data, forward, tuple(ignore)
        self.diagnosis: Diagnosis | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = next(iter(trainer.optimizers), None)
        self.diagnosis = diagnose(
            pl_module, self.data, optimizer=optimizer, forward=self.forward, ignore=self.ignore
        )
        if trainer.is_global_zero:
            print(self.diagnosis)
