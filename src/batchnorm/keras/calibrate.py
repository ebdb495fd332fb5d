"""Moving statistics := statistics of a whole data set."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from batchnorm.errors import DataError, OptionError
from batchnorm.statistics.calibration import CalibrationReport, LayerChange
from batchnorm.statistics.moments import PooledMoments, merge

from .calibration.batch_moments import BatchMoments
from .calibration.batches import batches, samples
from .norms import norms_within
from .policies import is_frozen

Layer = Any
Verbose = Literal["auto", 0, 1, 2]
Array = NDArray[np.float64]


def calibrate(
    model: keras.Model,
    data: Any,
    *,
    batch_size: int = 32,
    steps: int | None = None,
    verbose: Verbose = "auto",
) -> CalibrationReport:
    """Set the moving statistics of every batch normalization to the statistics of all of `data`.

    One pass over `data`: normalizations use the statistics of each batch, everything else (dropout, for one)
    runs as in inference. With n_b, mean_b, m2_b of what a layer received in batch b:

        moving_mean     = Σ n_b mean_b / Σ n_b
        moving_variance = m2 / n,    n and m2 of all batches merged by Chan's formula, in float64

    so that batches of unequal size weigh by their size, and masked values do not count. The variance is the
    biased one, ÷ n, as in Keras's own moving variance. With renorm=True, moving_stddev = sqrt(moving_variance
    + epsilon), and what training corrects by (renorm_mean, renorm_stddev) stays.

    A layer with no normalization before it gets the same statistics however the data is split; a deeper one
    receives inputs that were normalized batch by batch, so its statistics depend on the split (the report
    marks it): larger batches come closer. A frozen layer (`trainable=False`, or `statistics=Running()`)
    uses and keeps its own moving statistics. To keep those of layers that the model calls with
    training=False, as in transfer learning, freeze them. What else `statistics` may be, it is calibrated by
    whole batches.

    Args:
        model: of any kind, with layers of Keras's or of this library at any nesting. One that has never been
            built is built by the first batch.
        data: samples of training, in eval form: an array or tensor, or a dict or list of them, one per input;
            a tuple (x, y) or (x, y, sample_weight) of such; `tf.data.Dataset`, `keras.utils.PyDataset`,
            torch's `DataLoader`, or any other iterable of batches: x, (x, y) or (x, y, sample_weight).
            Targets and weights are not used. A list of batches whose batches are bare arrays goes in as
            iter(batches).
        batch_size: samples per batch, for arrays.
        steps: at most this many batches; None = all.
        verbose: "auto" or 1 = a progress bar, 2 = one line, 0 = nothing.

    Returns:
        A report: layers, samples, and how far each layer's statistics moved, in standard deviations.

    Raises:
        OptionError: (a ValueError) no model of Keras, or one without batch normalization or with frozen ones
            only.
        DataError: (a ValueError) no batch, data of unknown form, or a layer that received NaN or inf, no
            valid value, one value per channel in all, or constants from a normalization over single values.

    Warns:
        UserWarning: names the layers that no sample reached; they are left as before.

    An exception or an interruption, at any point, leaves the model exactly as it was.

    Differs from torch: `batchnorm.calibrate` sets the unbiased variance, ÷ (n - 1), as torch does.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 2; Wu & Johnson 2021, arXiv:2105.07576, sec. 3.
    """
    calibration = Calibration(batch_size, steps, verbose)
    report = calibration.run(model, data)
    if report.unreached:
        warnings.warn(unreached_message(report), UserWarning, stacklevel=2)
    return report


def unreached_message(report: CalibrationReport) -> str:
    return f"calibrate: no sample reached {', '.join(report.unreached)}; left as before"


def is_built(model: Layer) -> bool:
    """Whether every layer of the model has its weights."""
    # Private, but the only list that has the layers inside wrappers and users' own layers too.
    return all(layer.built for layer in model._flatten_layers())


def live_norms(model: Layer) -> list[tuple[str, Layer]]:
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

    def run(self, model: Layer, data: Any) -> CalibrationReport:
        """Calibrate the model; see `calibrate`, but for the warning."""
        if not isinstance(model, keras.layers.Layer):
            kind = type(model)
            raise OptionError(
                f"calibrate takes a Keras model or layer; got a {kind.__module__}.{kind.__name__} (for "
                "models of torch there is batchnorm.calibrate)"
            )
        if hasattr(model, "jax_state_sync"):  # inside `fit` on JAX, the weights are not in the variables
            model.jax_state_sync()
        found, total = batches(model, data, self.batch_size, self.steps)
        bar = keras.utils.Progbar(total, verbose=self.verbose)
        tally = _Tally()
        for x in found:
            if tally.batches == 0:
                self._forward = self._prepared(model, x)
            assert self._forward is not None
            tally.add(self._forward(x), samples(x))
            bar.update(tally.batches, finalize=False)
        if self._forward is None or tally.batches == 0:
            raise DataError(
                "calibrate received no batch: data is empty, or an iterator that was used up before"
            )
        bar.target = tally.batches
        bar.update(tally.batches, finalize=True)
        return _finish(model, self._forward.norms, tally)

    def forget(self) -> None:
        """Release the compiled forward."""
        self._forward = None

    def _prepared(self, model: Layer, x: Any) -> BatchMoments:
        if not is_built(model):
            model(x, training=False)
        live = live_norms(model)
        before = self._forward
        return before if before is not None and before.serves(model, live) else BatchMoments(model, live)


class _Tally:
    """Merges what each layer received, by the layer's number.

    Attributes:
        pooled: the moments of all batches.
        inexact: layers that another normalization ran before.
        followed: layers that another normalization ran after.
        most: the largest number of values per channel in one batch.
    """

    def __init__(self) -> None:
        self.samples = self.batches = 0
        self.pooled: dict[int, PooledMoments] = {}
        self.inexact: set[int] = set()
        self.followed: set[int] = set()
        self.most: dict[int, float] = {}

    def add(self, received: list[tuple[int, PooledMoments]], count: int) -> None:
        self.samples += count
        self.batches += 1
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and inf are refused at the end, by name
            for layer, found in received:
                self.pooled[layer] = merge(self.pooled[layer], found) if layer in self.pooled else found
                self.most[layer] = max(self.most.get(layer, 0.0), float(found.count.max(initial=0.0)))
        order = [layer for layer, _ in received]
        self.inexact.update(order[1:])
        self.followed.update(order[:-1])

    def most_before_another(self, layer: int) -> float:
        """Return `most` of a layer that another one ran after; infinity for others."""
        return self.most[layer] if layer in self.followed else math.inf


def _finish(model: Layer, live: Sequence[tuple[str, Layer]], tally: _Tally) -> CalibrationReport:
    """Check everything, then write everything."""
    changes: list[LayerChange] = []
    writes: list[tuple[Any, Array]] = []
    for number, (name, layer) in enumerate(live):
        if number in tally.pooled:
            mean, var = _statistics(name, layer, tally.pooled[number], tally.most_before_another(number))
            values = int(np.max(tally.pooled[number].count))
            changes.append(_change(name, layer, values, mean, var, number not in tally.inexact))
            writes += [(layer.moving_mean, mean), (layer.moving_variance, var)]
            if layer.renorm:
                writes.append((layer.moving_stddev, np.sqrt(var + layer.epsilon)))
    frozen = tuple(name for name, layer in norms_within(model) if is_frozen(layer))
    unreached = tuple(name for number, (name, _) in enumerate(live) if number not in tally.pooled)
    _write(writes)
    return CalibrationReport(tally.samples, tally.batches, tuple(changes), unreached, frozen)


def _statistics(name: str, layer: Layer, found: PooledMoments, most: float) -> tuple[Array, Array]:
    """Return the new moving mean and variance, `[C]`; a channel that got no value keeps the old.

    Args:
        most: the largest number of values per channel in a batch; infinity if no normalization ran after it.
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
    mean = np.where(empty, _value(layer.moving_mean), found.mean)
    var = np.where(empty, _value(layer.moving_variance), found.m2 / np.where(empty, 1, found.count))
    dtype = keras.backend.standardize_dtype(layer.moving_variance.dtype)
    with np.errstate(over="ignore"):
        held = [values.astype("float32" if dtype == "bfloat16" else dtype) for values in (mean, var)]
    if not all(np.isfinite(values).all() for values in held):
        raise DataError(f"received NaN or inf, or values too large for {dtype} statistics; {unchanged}", name)
    return mean, var


def _change(name: str, layer: Layer, values: int, mean: Array, var: Array, exact: bool) -> LayerChange:
    old = (_value(layer.moving_mean), _value(layer.moving_variance))
    return LayerChange.between(name, values, old, (mean, var), layer.epsilon, exact)


def _value(variable: Any) -> Array:
    """Return a copy of a variable's value, float64."""
    values: Array = ops.convert_to_numpy(variable.value).astype(np.float64)
    return values


def _write(writes: list[tuple[Any, Array]]) -> None:
    """Assign each value to its variable; on an interruption midway, put all of them back."""
    before = [_value(variable) for variable, _ in writes]
    try:
        for variable, value in writes:
            variable.assign(value)
    except BaseException:
        for (variable, _), old in zip(writes, before, strict=True):
            variable.assign(old)
        raise
