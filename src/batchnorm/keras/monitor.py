"""Logs how the batch normalizations of a model do while `fit` trains it."""

from __future__ import annotations

import keras
import numpy as np

from batchnorm.doctor.measurements import distance_of_statistics
from batchnorm.doctor.state_checks import dead_channels
from batchnorm.errors import OptionError
from batchnorm.loggers import Log, Row, check_every, log_function

from .calibrate import Array, float64_of, synchronize
from .norms import Norm, is_frozen, norms_within


class Monitor(keras.callbacks.Callback):
    """Logs how each batch normalization does, at every `every`-th batch of `fit`.

    At batches 0, `every`, 2 · `every`, … it logs a flat dict of numbers. Of `bn/<layer>/` it has

        mean_distance   sqrt(mean((batch mean − moving mean)² / (batch variance + epsilon))), over channels
        std_ratio       exp(sqrt(mean(log(batch std / moving std)²))), 1 or more
        dead_channels   share 0..1 of channels whose gamma is 0, or next to 0 beside the others
        skipped         batches with inf or NaN until now, of a layer with nonfinite="skip"

    where the moving statistics are those before the batch. Keras shows no callback what a layer receives: the
    batch's statistics are computed from how the moving ones move, `(new − momentum · old) / (1 − momentum)`,
    for a layer that is called once in a batch. What did not move, moves in turn (`Ghost(sequential=True)`) or
    by `renorm=True` has no distance. With `steps_per_execution=k`, those of k batches count as one.

    Args:
        log: where rows go: a function of (dict, step); a SummaryWriter of TensorBoard or a run of W&B; or the
            path of a CSV file (step, name, value), to which rows are added.
        every: number of batches from one row to the next.

    Attributes:
        step: number of batches until now; set it to go on counting after a resumed training.

    Raises:
        OptionError: (a ValueError) `every` below 1; at the start of training, a model that is built and has
            no batch normalization.
        ArgumentTypeError: (a TypeError) `log` is none of these.
        FileError, DataError: (an OSError, a ValueError) the CSV file cannot be written, or has other columns.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="norm")])
        >>> model.compile("sgd", "mse")
        >>> x, rows = numpy.random.rand(64, 3), {}
        >>> monitor = batchnorm.keras.Monitor(lambda row, step: rows.update({step: sorted(row)}), every=2)
        >>> history = model.fit(x, x, batch_size=16, verbose=0, callbacks=[monitor])
        >>> list(rows), rows[0]
        ([0, 2], ['bn/norm/dead_channels', 'bn/norm/mean_distance', 'bn/norm/std_ratio'])

    Differs from torch: `batchnorm.monitor` has gradients and numbers of values too.
    """

    def __init__(self, log: Log, *, every: int = 100) -> None:
        super().__init__()
        check_every(every)
        self.every = every
        self.step = 0
        self._log = log_function(log)
        self._first = 0  # batch of the epoch that an execution begins with
        self._before: dict[str, tuple[Norm, Array, Array]] | None = None

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        """Refuse a model without batch normalization."""
        if self.model.built and not any(norms_within(self.model)):
            raise OptionError(f"{type(self.model).__name__} has no batch normalization to monitor")

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        """Note the moving statistics before a batch whose turn it is."""
        self._first, self._before = batch, None
        if self.step % self.every == 0:
            synchronize(self.model)
            self._before = {
                name: (norm, float64_of(norm.moving_mean), float64_of(norm.moving_variance))
                for name, norm in norms_within(self.model)
                if norm.built
            }

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        """Log the row of such a batch."""
        batches = batch - self._first + 1
        if self._before is not None:
            synchronize(self.model)
            row: Row = {}
            for name, (norm, mean, var) in self._before.items():
                found = {**_distances(norm, mean, var, batches), **_of_state(norm)}
                row |= {f"bn/{name}/{what}": value for what, value in found.items()}
            self._log(row, self.step)
        self.step += batches


def _distances(norm: Norm, mean: Array, var: Array, batches: int) -> Row:
    """Return how far a batch is from the moving statistics before it, which it has moved since."""
    policy = getattr(norm, "statistics", None)
    moved = [float64_of(norm.moving_mean) - mean, float64_of(norm.moving_variance) - var]
    is_in_turn = norm.renorm or (policy is not None and policy.is_sequential)
    if is_frozen(norm) or is_in_turn or not any(np.any(by != 0) for by in moved):
        return {}
    share = 1 - norm.momentum**batches
    batch = mean + moved[0] / share, np.maximum(var + moved[1] / share, 0)
    mean_distance, std_ratio = distance_of_statistics(*batch, (mean, var), norm.epsilon)
    return {"mean_distance": mean_distance, "std_ratio": std_ratio}


def _of_state(norm: Norm) -> Row:
    """Return what a norm's variables show."""
    row: Row = {}
    if norm.scale:
        row["dead_channels"] = float(dead_channels(float64_of(norm.gamma)).mean())
    if getattr(norm, "skipped", None) is not None:
        row["skipped"] = float(float64_of(norm.skipped))
    return row
