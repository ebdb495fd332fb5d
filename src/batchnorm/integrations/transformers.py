"""Callbacks for the Trainer of transformers: calibrate, freeze, monitor and diagnose batch normalizations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from batchnorm.doctor.findings import Diagnosis
from batchnorm.loggers import Log, Row, check_every
from batchnorm.models.calibrate import calibrate, norms_to_calibrate
from batchnorm.models.calibration.batches import Forward
from batchnorm.models.diagnose import diagnose
from batchnorm.models.freeze import affine_parameters, freeze, hold
from batchnorm.models.monitor import StepObserver
from batchnorm.statistics.calibration import CalibrationReport, check_repeatable

Data = Iterable[object]


class Calibrate(TrainerCallback):
    """Calibrates the model before each evaluation of `train`, before a checkpoint is saved, and in the end.

    Evaluations and checkpoints then have statistics of their weights, and training goes on from these. Every
    process calls `batchnorm.calibrate`. `Trainer.evaluate()` by itself tells no callback before it begins.

    Args:
        data: training samples, as `batchnorm.calibrate` takes them: batches of the Trainer's collator, for
            one; not an iterator.
        forward: called as `forward(model, batch)` for batches of any other form.
        samples: stop after this many per calibration; None = all.

    Attributes:
        report: of the last calibration; None before the first.
    """

    def __init__(self, data: Data, *, forward: Forward | None = None, samples: int | None = None) -> None:
        check_repeatable(data)
        self.data, self.forward, self.samples = data, forward, samples
        self.report: CalibrationReport | None = None
        self._is_current = False

    def on_train_begin(self, *_: object, model: nn.Module, **__: object) -> None:
        norms_to_calibrate(model)  # refuses now what would be refused after an epoch

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._is_current = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of: Any
    ) -> None:
        if control.should_evaluate or control.should_save:
            self._calibrate(of["model"])

    on_epoch_end = on_step_end

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: object, **of: Any) -> None:
        if not (args.load_best_model_at_end and state.best_model_checkpoint):  # which was calibrated
            self._calibrate(of["model"])

    def _calibrate(self, model: nn.Module) -> None:
        if not self._is_current:
            self.report = calibrate(model, self.data, forward=self.forward, samples=self.samples)
            self._is_current = True


class Freeze(TrainerCallback):
    """Freezes batch normalizations for all of `train`, whatever sets `requires_grad`: `batchnorm.freeze`.

    Args:
        part: name of the submodule whose layers are frozen, such as "backbone"; "" = the whole model.
        parameters: stop weight and bias from learning too.
    """

    def __init__(self, part: str = "", *, parameters: bool = False) -> None:
        self.part, self.parameters = part, parameters
        self._held: list[nn.Parameter] = []

    def on_init_end(self, *_: object, model: nn.Module | None = None, **__: object) -> None:
        if model is not None:  # a Trainer with model_init has none yet
            part = freeze(model.get_submodule(self.part), parameters=self.parameters)
            self._held = affine_parameters(part) if self.parameters else []

    on_train_begin = on_init_end  # of a callback that was added to a Trainer

    def on_step_begin(self, *_: object, **__: object) -> None:
        hold(self._held)


class Monitor(TrainerCallback):
    """Logs how each batch normalization does, at every `every`-th optimizer step: `batchnorm.monitor`.

    Args:
        log: as `batchnorm.monitor` takes it; None = `trainer.state.log_history`, as an entry of its own.
        every: number of optimizer steps from one row to the next; the micro-batches of a step are pooled.
    """

    def __init__(self, log: Log | None = None, *, every: int = 100) -> None:
        check_every(every)
        self.log, self.every = log, every
        self._observer: StepObserver | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of: Any
    ) -> None:
        def keep(row: Row, step: int) -> None:
            state.log_history.append({**row, "step": step})

        if self._observer is not None:
            self._observer.detach()  # of a training that ended by an exception
        if state.is_world_process_zero:
            self._observer = StepObserver(of["model"], keep if self.log is None else self.log)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        if self._observer is not None and state.global_step % self.every == 0:
            self._observer.attach(state.global_step)

    def on_step_end(self, *_: object, **__: object) -> None:
        if self._observer is not None:
            self._observer.log()


class Doctor(TrainerCallback):
    """Diagnoses the model when `train` begins, and prints what it finds: `batchnorm.diagnose`.

    Args:
        data: samples of training, as `batchnorm.diagnose` takes them; None = the state of the model only.
        forward: called as `forward(model, batch)`, and returns the output as a tensor.
        ignore: checks to leave out.

    Attributes:
        diagnosis: what was found; None before `train`.
    """

    def __init__(
        self, data: Data | None = None, *, forward: Forward | None = None, ignore: Iterable[str] = ()
    ) -> None:
        self.data, self.forward, self.ignore = data, forward, tuple(ignore)
        self.diagnosis: Diagnosis | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **of: Any) -> None:
        self.diagnosis = diagnose(
            of["model"], self.data, optimizer=of["optimizer"], forward=self.forward, ignore=self.ignore
        )
        if state.is_world_process_zero:
            print(self.diagnosis)
