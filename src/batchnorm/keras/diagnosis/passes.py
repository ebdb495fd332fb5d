"""Runs the samples through a Keras model by each statistics, and records what its norms receive.

Every forward runs eagerly in a `keras.StatelessScope`, in which what a layer assigns lives until the forward
ends: the model does not change.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from batchnorm.doctor.measurements import Array, Measured, Received, Score, scored
from batchnorm.keras.batch_layout import split, valid_values
from batchnorm.keras.calibration.batch_moments import Found, _in_evaluation, _measured, _wide
from batchnorm.keras.calibration.batches import Inputs, samples
from batchnorm.keras.moments import moments, wide
from batchnorm.keras.norms import Norm, Norms, is_frozen, norms_within
from batchnorm.statistics.moments import PooledMoments, merge

from .state import array

MOST_ALONE = 16  # layers whose statistics are replaced alone
Batch = tuple[Inputs, "NDArray[Any] | None"]
# Makes of a layer's `call` the one that runs in its place.
Shadow = Callable[[keras.layers.Layer, Callable[..., Any]], Callable[..., Any]]


def measure(model: keras.Model, batches: list[Batch]) -> Measured:
    """Return what the samples show; the model is as before, whatever happens."""
    measured = Measured(samples=sum(samples(x) for x, _ in batches))
    passes = _Passes(model, batches, measured)
    passes.by_running()
    if measured.broken is None and not measured.is_data_broken:
        passes.by_batch()
        passes.by_population()
        passes.alone()
        passes.mates()
    return measured


class _Passes:
    """The passes of one diagnosis, as at inference."""

    def __init__(self, model: keras.Model, batches: list[Batch], measured: Measured) -> None:
        self.model, self.batches, self.measured = model, batches, measured
        self.norms: Norms = list(norms_within(model))
        self.live = {name: norm for name, norm in self.norms if not is_frozen(norm)}
        labels = [y for _, y in batches]
        known = [y for y in labels if y is not None]
        self.labels: NDArray[Any] | None = np.concatenate(known) if len(known) == len(labels) else None
        self._kept: dict[str, Array] = {}

    def by_running(self) -> None:
        """Record what the norms receive, as the model is deployed, and where it is first not finite."""
        for x, _ in self.batches:
            leaves = [ops.convert_to_numpy(leaf) for leaf in keras.tree.flatten(x) if leaf is not None]
            floats = [leaf for leaf in leaves if leaf.dtype.kind == "f"]
            self.measured.is_data_broken |= not all(np.isfinite(leaf).all() for leaf in floats)
        names = {id(norm): name for name, norm in self.norms}
        calls: Counter[str] = Counter()

        def watched(layer: keras.layers.Layer, call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if id(layer) in names:
                    self._receive(names[id(layer)], layer, calls, args, kwargs)
                result = call(*args, **kwargs)
                self._look(names.get(id(layer), layer.name), args, result)
                return result

            return run

        with _shadowed(self.model, watched):
            self._score("running", before=calls.clear)

    def by_batch(self) -> None:
        """Normalize by each batch; the moments of all are those of the population."""
        found: Found = []
        with _measured(list(self.live.items()), found):
            self._score("batch")
        names = list(self.live)
        pooled = self.measured.population
        for number, packed in found:
            of = _wide(packed)
            of = of._replace(count=float(np.max(of.count)))
            pooled[names[number]] = merge(pooled[names[number]], of) if names[number] in pooled else of

    def by_population(self) -> None:
        """Normalize by the statistics of the population, as `calibrate` would set them."""
        if self.measured.population:
            self._score("population", self.measured.population)
            if self.measured.measure == "difference of outputs":
                for name in ("running", "batch"):
                    _, score = scored(self._kept[name], None, self._kept["population"])
                    self.measured.scores[name] = score

    def alone(self) -> None:
        """Replace the statistics of one layer at a time, of those that are furthest off."""
        off = {name: _distance(self.live[name], of) for name, of in self.measured.population.items()}
        for name in [n for n in sorted(off, key=lambda n: -off[n])[:MOST_ALONE] if off[n] > 0.1]:
            found = {name: self.measured.population[name]}
            self.measured.alone[name] = self._score(name, found, keep=False)

    def mates(self) -> None:
        """Change the neighbours of samples, as at inference."""
        x = next((x for x, _ in self.batches if samples(x) >= 2), None)
        if x is None:
            self.measured.unchecked.append("neighbours in a batch: every batch has one sample")
            return
        size = min(8, samples(x))
        kept = size // 2

        def cut(leaf: Any) -> Any:
            return None if leaf is None else ops.convert_to_numpy(leaf)[:size]

        def other(leaf: Any) -> Any:
            if leaf is None:
                return None
            values = ops.convert_to_numpy(leaf)[:size].copy()
            if values.dtype.kind == "f":
                values[kept:] = 1.5 * values[kept:][::-1] + 0.5 * values.std()
            else:
                values[kept:] = values[:1]
            return values

        traces: list[list[tuple[str, Array, Array]]] = []
        outputs = []
        for change in (cut, other):
            trace: list[tuple[str, Array, Array]] = []
            with _shadowed(self.model, _tracing(trace, {id(n): name for name, n in self.norms}, kept)):
                outputs.append(_run(self.model, keras.tree.map_structure(change, x), {}))
            traces.append(trace)
        first, second = outputs
        change_of_outputs = float(np.abs(first[:kept] - second[:kept]).max(initial=0.0))
        self.measured.mates = change_of_outputs / (float(first.std()) or 1.0), _first_reader(*traces)
        self.measured.forwards += 2 * size / self.measured.samples

    def _score(
        self,
        name: str,
        statistics: Mapping[str, PooledMoments] | None = None,
        *,
        keep: bool = True,
        before: Callable[[], None] = lambda: None,
    ) -> Score:
        new = {n: (of.mean, of.m2 / max(of.count, 1)) for n, of in (statistics or {}).items()}
        values = {id(self.live[n]): (self.live[n], *of) for n, of in new.items()}
        outputs = []
        for x, _ in self.batches:
            before()
            outputs.append(_run(self.model, x, values))
        self.measured.forwards += 1
        is_alike = len({output.shape[1:] for output in outputs}) == 1
        whole = np.concatenate(outputs if is_alike else [output.reshape(-1) for output in outputs])
        measure, score = scored(*_classes_first(whole, self.labels), self._kept.get("population"))
        if keep:
            self._kept[name] = _classes_first(whole, self.labels)[0]
            self.measured.measure = measure
            self.measured.scores[name] = score
        return score

    def _receive(
        self, name: str, norm: Norm, calls: Counter[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        inputs, mask = args[0] if args else kwargs["inputs"], kwargs.get("mask")
        axis = norm.axis % len(inputs.shape)
        batch = split(wide(inputs), valid_values(mask, inputs, axis, name), axis, size=None)
        packed = ops.stack([ops.reshape(value, (-1,)) for value in moments(batch.x, batch.axes, batch.valid)])
        of = _wide(packed)
        values = ops.convert_to_numpy(ops.cast(inputs, "float32")).astype(np.float64)
        others = tuple(a for a in range(1, values.ndim) if a != axis)
        means = values.mean(others) if axis else values.mean(tuple(range(2, values.ndim))).T
        kept = self.measured.received.setdefault(name, Received())
        call, calls[name] = calls[name], calls[name] + 1
        of = of._replace(count=float(np.max(of.count)))
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        kept.add(call, of, means, float(np.abs(values).max(initial=0.0)), dtype)

    def _look(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        is_known = self.measured.broken is not None or self.measured.is_data_broken
        if not is_known and not _are_finite(result) and _are_finite(args):
            self.measured.broken = name


def _run(model: keras.Model, x: Inputs, values: Mapping[int, tuple[Norm, Array, Array]]) -> Array:
    """Return the first floating output, with these moving statistics."""

    def forward(x: Inputs) -> Any:
        with keras.StatelessScope():
            for norm, mean, var in values.values():
                norm.moving_mean.assign(mean)
                norm.moving_variance.assign(var)
            return model(x, training=False)

    torchs = keras.backend.backend() == "torch"
    outputs = _in_evaluation(model, forward, x) if torchs else forward(x)
    first = ops.convert_to_numpy(ops.cast(keras.tree.flatten(outputs)[0], "float32"))
    return np.asarray(first, np.float64)


@contextlib.contextmanager
def _shadowed(model: keras.Model, shadow: Shadow) -> Iterator[None]:
    """Run another `call` of every layer without layers in it, within this context."""
    layers = [layer for layer in model._flatten_layers(include_self=False) if not layer._layers]
    before = [(layer, layer.__dict__.get("call")) for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["call"] = shadow(layer, layer.call)
        yield
    finally:
        for layer, call in before:
            if call is None:
                layer.__dict__.pop("call", None)
            else:
                layer.__dict__["call"] = call


def _tracing(trace: list[tuple[str, Array, Array]], names: Mapping[int, str], kept: int) -> Shadow:
    """Return a shadow that records what each layer receives and returns for the first samples."""

    def traced(layer: keras.layers.Layer, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            leaves = [keras.tree.flatten(value) for value in (args, result)]
            if all(len(found) and hasattr(found[0], "shape") for found in leaves):
                given, made = (ops.convert_to_numpy(found[0])[:kept].copy() for found in leaves)
                trace.append((names.get(id(layer), layer.name), given, made))
            return result

        return run

    return traced


def _first_reader(
    first: list[tuple[str, Array, Array]], second: list[tuple[str, Array, Array]]
) -> str | None:
    for (name, given, made), (_, given_b, made_b) in zip(first, second, strict=False):
        if _is_close(given, given_b) and not _is_close(made, made_b):
            return name
    return None


def _is_close(a: Array, b: Array) -> bool:
    return a.shape == b.shape and np.allclose(a, b, 1e-4, 1e-5)


def _are_finite(values: Any) -> bool:
    leaves = [leaf for leaf in keras.tree.flatten(values) if ops.is_tensor(leaf)]
    floats = [leaf for leaf in leaves if "float" in keras.backend.standardize_dtype(leaf.dtype)]
    return all(bool(ops.convert_to_numpy(ops.all(ops.isfinite(leaf)))) for leaf in floats)


def _distance(norm: Norm, found: PooledMoments) -> float:
    mean, var = array(norm.moving_mean), array(norm.moving_variance)
    new = found.m2 / max(found.count, 1) + norm.epsilon
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = 0.5 * np.log(new / (var + norm.epsilon))
        off = np.sqrt(np.mean((found.mean - mean) ** 2 / new)) + np.sqrt(np.mean(logs**2))
    return float(off) if np.isfinite(off) else float("inf")


def _classes_first(outputs: Array, labels: NDArray[Any] | None) -> tuple[Array, NDArray[Any] | None]:
    """Return outputs with classes on the second axis, and labels as classes where they are one-hot."""
    if labels is None or outputs.ndim < 2:
        return outputs, labels
    if labels.ndim == outputs.ndim and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if labels.shape == outputs.shape and outputs.shape[-1] > 1 and set(np.unique(labels)) <= {0, 1}:
        labels = labels.argmax(-1)
    if labels.dtype.kind in "iu" and outputs.shape[-1] == 1 and labels.max(initial=0) <= 1:
        outputs = np.concatenate([1 - outputs, outputs], -1)  # of a sigmoid
    return np.moveaxis(outputs, -1, 1) if labels.dtype.kind in "iu" else outputs, labels
