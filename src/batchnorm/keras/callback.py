"""Calibration as a callback of `fit`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import keras

from batchnorm.errors import OptionError
from batchnorm.statistics.calibration import CalibrationReport

from .calibrate import Calibration, Verbose, is_built, live_norms, unreached_message

When = Literal["end", "validation"]


class Calibrate(keras.callbacks.Callback):
    """Leaves the model calibrated after `fit`: see `batchnorm.keras.calibrate`.

        model.fit(x, y, callbacks=[batchnorm.keras.Calibrate(x)])

    The order of the callbacks counts. List it after those that change weights at the end of training or
    before a validation: `EarlyStopping(restore_best_weights=True)`, which restores the moving statistics too,
    and `SwapEMAWeights`. `ModelCheckpoint` saves at the end of an epoch, before the end of `fit`: what it
    saves is calibrated with when="validation" only.

    Args:
        data: as `calibrate` takes it; training samples.
        batch_size: samples per batch, for arrays.
        steps: at most this many batches per calibration; None = all.
        when: "end" = once, after training. "validation" = before each validation as well, in `fit` and in
            `evaluate` (if it is given the callback): validation then judges the weights by statistics of
            their own, and training goes on from the calibrated statistics.
        verbose: as in `calibrate`.

    Attributes:
        report: of the last calibration; None before the first.

    Raises:
        OptionError: (a ValueError) options out of range; data is an iterator, which would serve one
            calibration only, and when="validation"; at the start of training, a model without batch
            normalization.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 2.
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int = 32,
        steps: int | None = None,
        when: When = "end",
        verbose: Verbose = 0,
    ) -> None:
        super().__init__()
        if when not in ("end", "validation"):
            raise OptionError(f'when is "end" or "validation"; got {when!r}')
        if when == "validation" and isinstance(data, Iterator):
            raise OptionError(
                f'a {type(data).__name__} is used up by one calibration, and when="validation" makes '
                "several: pass arrays or a data set"
            )
        self.data = data
        self.when = when
        self.report: CalibrationReport | None = None
        self._calibration = Calibration(batch_size, steps, verbose)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Refuse at once what would be refused after hours of training."""
        del logs
        if is_built(self.model):
            live_norms(self.model)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Calibrate before a validation."""
        del logs
        if self.when == "validation":
            self._calibrate()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Calibrate the trained model."""
        del logs
        self._calibrate()
        self._calibration.forget()

    def _calibrate(self) -> None:
        self.report = self._calibration.run(self.model, self.data)
        if self.report.unreached:
            warnings.warn(unreached_message(self.report), UserWarning, stacklevel=3)
