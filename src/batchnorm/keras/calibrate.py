"""Sets moving statistics to those of a whole data set: as a function, and as a callback of `fit`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral
from typing import Literal

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from batchnorm.errors import DataError, OptionError
from batchnorm.statistics.calibration import CalibrationReport, LayerChange
from batchnorm.statistics.moments import PooledMoments, merge

from .calibration.batch_moments import BatchMoments
from .calibration.batches import Data, Inputs, batches, samples
from .norms import Norm, Norms, is_frozen, norms_within

Verbose = Literal["auto", 0, 1, 2]
When = Literal["end", "validation"]
Array = NDArray[np.float64]


def calibrate(
    model: keras.Model,
    data: Data,
    *,
    batch_size: int = 32,
    steps: int | None = None,
    verbose: Verbose = "auto",
) -> CalibrationReport:
    """Set the moving statistics of every batch normalization to the statistics of all of `data`.

    One pass over `data`: normalizations use the statistics of each batch, everything else (dropout, for one)
    runs as in inference. With n_b, mean_b, m2_b of what a layer received in batch b, masked values left out:

        moving_mean     = Σ n_b mean_b / Σ n_b
        moving_variance = m2 / n,    n and m2 of all batches merged by Chan's formula, in float64

    With renorm=True, moving_stddev = sqrt(moving_variance + epsilon); renorm_mean and renorm_stddev stay.

    A layer after another normalization receives inputs that were normalized batch by batch, so its statistics
    depend on the split into batches: the report marks it, and larger batches come closer. Frozen layers
    (`trainable=False`, `statistics=Running()`) use and keep theirs: freeze what the model calls with
    training=False, as in transfer learning. An exception or an interruption leaves the model as it was.

    Args:
        model: any, with layers of Keras's or ours at any nesting; the first batch builds one that is not.
        data: training samples, preprocessed as for inference: an array or tensor, or a dict or list of them,
            one per input; a tuple (x, y) or (x, y, sample_weight) of such; `tf.data.Dataset`,
            `keras.utils.PyDataset`, torch's `DataLoader`, or any other iterable of batches: x, (x, y) or
            (x, y, sample_weight). y and weights are not used. Of a list of bare arrays, pass iter(batches).
        batch_size: samples per batch, for arrays.
        steps: at most this many batches; None = all.
        verbose: "auto" or 1 = a progress bar, 2 = one line, 0 = nothing.

    Returns:
        A report: layers, samples, and how far each layer's statistics moved, in standard deviations.

    Raises:
        OptionError: (a ValueError) no Keras model, none or only frozen normalizations, an option's value.
        DataError: (a ValueError) no batch, data of unknown form, or a layer that received NaN or inf, no
            valid value, one value per channel in all, or constants from a normalization over single values.
        InputShapeError: (a ValueError) a mask that does not fit.

    Warns:
        UserWarning: names the layers that no sample reached; they are left as before.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
        >>> batchnorm.keras.calibrate(model, numpy.random.rand(256, 3), verbose=0).batches
        8

    Differs from torch: `batchnorm.calibrate` sets the unbiased variance, ÷ (n - 1), as torch does.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 2; Wu & Johnson 2021, arXiv:2105.07576, sec. 3.
    """
    report = Calibration(batch_size, steps, verbose).run(model, data)
    report.warn_of_unreached(stacklevel=2)
    return report


class Calibrate(keras.callbacks.Callback):
    """Calibrates the model at the end of `fit`, or before each validation: see `batchnorm.keras.calibrate`.

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
            normalization; when it calibrates, as `calibrate`, and its DataError.

    Warns:
        UserWarning: names the layers that no sample reached; they are left as before.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
        >>> model.compile("sgd", "mse")
        >>> x = numpy.random.rand(64, 3)
        >>> callback = batchnorm.keras.Calibrate(x)
        >>> history = model.fit(x, x, epochs=2, verbose=0, callbacks=[callback])
        >>> callback.report.samples
        64

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 2.
    """

    def __init__(
        self,
        data: Data,
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

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        """Refuse at once what would be refused after hours of training."""
        if _is_built(self.model):
            _live_norms(self.model)

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        """Calibrate before a validation."""
        if self.when == "validation":
            self._calibrate()

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        """Calibrate the trained model."""
        self._calibrate()
        self._calibration.forget()

    def _calibrate(self) -> None:
        self.report = self._calibration.run(self.model, self.data)
        self.report.warn_of_unreached(stacklevel=3)


class Calibration:
    """One way to calibrate, for any number of times; the compiled forward is kept from one to the next.

    Args: those of `calibrate`.
    """

    def __init__(self, batch_size: int, steps: int | None, verbose: Verbose) -> None:
        sizes: dict[str, object] = {"batch_size": batch_size, "steps": 1 if steps is None else steps}
        for name, value in sizes.items():
            if not isinstance(value, Integral) or value < 1:
                raise OptionError(f"{name} is a number of 1 or more; got {value!r}")
        if verbose not in ("auto", 0, 1, 2):
            raise OptionError(f'verbose is "auto", 0, 1 or 2; got {verbose!r}')
        self.batch_size = batch_size
        self.steps = steps
        self.verbose = 1 if verbose == "auto" else int(verbose)
        self._forward: BatchMoments | None = None

    def run(self, model: keras.Model, data: Data) -> CalibrationReport:
        """Calibrate the model; see `calibrate`, but for the warning."""
        if not isinstance(model, keras.layers.Layer):
            kind = type(model)
            raise OptionError(
                f"calibrate takes a Keras model or layer; got a {kind.__module__}.{kind.__name__} (for "
                "models of torch there is batchnorm.calibrate)"
            )
        synchronize(model)
        found, total = batches(model, data, self.batch_size, self.steps)
        bar = keras.utils.Progbar(total, verbose=self.verbose)
        accumulator = _Accumulator()
        for x in found:
            if accumulator.batches == 0:
                self._forward = self._prepared(model, x)
            assert self._forward is not None
            accumulator.add(self._forward(x), samples(x))
            bar.update(accumulator.batches, finalize=False)
        if self._forward is None or accumulator.batches == 0:
            raise DataError(
                "calibrate received no batch: data is empty, or an iterator that was used up before"
            )
        bar.target = accumulator.batches
        bar.update(accumulator.batches, finalize=True)
        return _finish(model, self._forward.norms, accumulator)

    def forget(self) -> None:
        """Release the compiled forward."""
        self._forward = None

    def _prepared(self, model: keras.Model, x: Inputs) -> BatchMoments:
        if not _is_built(model):
            model(x, training=False)
        live, before = _live_norms(model), self._forward
        return before if before is not None and before.serves(model, live) else BatchMoments(model, live)


def _is_built(model: keras.Model) -> bool:
    """Whether every layer of the model has its weights."""
    # Private, but the only list that has the layers inside wrappers and users' own layers too.
    return all(layer.built for layer in model._flatten_layers())


def _live_norms(model: keras.Model) -> Norms:
    """Return (name, layer) of the normalizations that are not frozen.

    Raises:
        OptionError: there is none.
    """
    every = list(norms_within(model))
    live = [(name, layer) for name, layer in every if not is_frozen(layer)]
    if not every:
        raise OptionError(f"{type(model).__name__} has no batch normalization to calibrate")
    if not live:
        raise OptionError(
            f"every batch normalization of {type(model).__name__} is frozen (trainable=False, or "
            "statistics=Running()), "
            f"{every[0][0]} for one: set trainable=True, or statistics=Batch(), on those to calibrate"
        )
    return live


class _Accumulator:
    """Merges what each layer received, by the number of the layer, as names may repeat.

    Attributes:
        pooled: the moments of all batches.
        preceded: layers that another normalization ran before.
        followed: layers that another normalization ran after.
        most: the largest number of values per channel in one batch.
    """

    def __init__(self) -> None:
        self.samples = self.batches = 0
        self.pooled: dict[int, PooledMoments] = {}
        self.preceded: set[int] = set()
        self.followed: set[int] = set()
        self.most: dict[int, float] = {}

    def add(self, received: list[tuple[int, PooledMoments]], count: int) -> None:
        """Add a batch of `count` samples."""
        self.samples += count
        self.batches += 1
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and inf are refused at the end, by name
            for layer, found in received:
                self.pooled[layer] = merge(self.pooled[layer], found) if layer in self.pooled else found
                self.most[layer] = max(self.most.get(layer, 0.0), float(found.count.max(initial=0.0)))
        order = [layer for layer, _ in received]
        self.preceded.update(order[1:])
        self.followed.update(order[:-1])


def _finish(model: keras.Model, live: Norms, accumulator: _Accumulator) -> CalibrationReport:
    """Check everything, then write everything."""
    changes: list[LayerChange] = []
    writes: list[tuple[keras.Variable, Array]] = []
    pooled = accumulator.pooled
    for number, (name, layer) in enumerate(live):
        if number in pooled:
            most = accumulator.most[number] if number in accumulator.followed else math.inf
            old = (float64_of(layer.moving_mean), float64_of(layer.moving_variance))
            mean, var = new = _statistics(name, layer, pooled[number], most, old)
            values, exact = int(np.max(pooled[number].count)), number not in accumulator.preceded
            changes.append(LayerChange.between(name, values, old, new, layer.epsilon, exact))
            writes += [(layer.moving_mean, mean), (layer.moving_variance, var)]
            if layer.renorm:
                writes.append((layer.moving_stddev, np.sqrt(var + layer.epsilon)))
    frozen = tuple(name for name, layer in norms_within(model) if is_frozen(layer))
    unreached = tuple(name for number, (name, _) in enumerate(live) if number not in pooled)
    write_all(writes)
    return CalibrationReport(accumulator.samples, accumulator.batches, tuple(changes), unreached, frozen)


def _statistics(
    name: str,
    layer: Norm,
    found: PooledMoments,
    most: float,
    old: tuple[Array, Array],
) -> tuple[Array, Array]:
    """Return the new moving mean and variance, `[C]`; a channel that got no value keeps the old.

    Args:
        name: of the layer, in errors.
        layer: whose statistics they are.
        found: moments of all that it received.
        most: the largest number of values per channel in a batch; infinity if no normalization ran after it.
        old: its moving mean and variance.
    """
    unchanged = "the model is unchanged"
    if not np.any(found.count > 0):
        raise DataError(f"received no valid value: all were masked; {unchanged}", name)
    if np.max(found.count) < 2:
        raise DataError(f"received one value per channel in all of the data: no variance; {unchanged}", name)
    if most < 2:
        raise DataError(
            "received one value per channel in every batch, which normalizes to a constant, all that the "
            f"normalizations after it would see: larger batches; {unchanged}",
            name,
        )
    empty = found.count == 0
    mean = np.where(empty, old[0], found.mean)
    var = np.where(empty, old[1], found.m2 / np.where(empty, 1, found.count))
    dtype = keras.backend.standardize_dtype(layer.moving_variance.dtype)
    with np.errstate(over="ignore"):
        held = [values.astype("float32" if dtype == "bfloat16" else dtype) for values in (mean, var)]
    if not all(np.isfinite(values).all() for values in held):
        raise DataError(f"received NaN or inf, or values too large for {dtype} statistics; {unchanged}", name)
    return mean, var


def synchronize(model: keras.Model) -> None:
    """Put the weights into the model's variables: inside `fit` on JAX, they are elsewhere."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def float64_of(variable: keras.Variable) -> Array:
    """Return a copy of a variable's value."""
    values: Array = ops.convert_to_numpy(variable.value).astype(np.float64)
    return values


def write_all(writes: list[tuple[keras.Variable, Array]]) -> None:
    """Assign each value to its variable; on an interruption midway, put all of them back."""
    before = [float64_of(variable) for variable, _ in writes]
    try:
        for variable, value in writes:
            variable.assign(value)
    except BaseException:
        for (variable, _), old in zip(writes, before, strict=True):
            variable.assign(old)
        raise
