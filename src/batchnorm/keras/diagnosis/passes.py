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

from batchnorm.doctor.measurements import Array, Measured, Received
from batchnorm.doctor.passes import Passes
from batchnorm.keras.batch_layout import valid_values
from batchnorm.keras.calibration.batch_moments import (
    Found,
    in_evaluation,
    measuring_moments,
    received_by,
    unpacked,
)
from batchnorm.keras.calibration.batches import Inputs, samples
from batchnorm.keras.norms import Norm, Norms, is_frozen, norms_within
from batchnorm.keras.protocols import Tensor
from batchnorm.keras.replaced_calls import Call, calls_replaced
from batchnorm.statistics.adapted import Adapted
from batchnorm.statistics.moments import PooledMoments, merge

from .state import array

Batch = tuple[Inputs, "NDArray[Any] | None"]


def measure(model: keras.Model, batches: list[Batch], measured: Measured) -> frozenset[str]:
    """Add to `measured` what the samples show; return the norms that the model calls with training=True."""
    measured.samples = sum(samples(x) for x, _ in batches)
    passes = _Passes(model, batches, measured)
    passes.take()
    return frozenset(passes.trained)


class _Passes(Passes):
    """The passes of one diagnosis, as at inference."""

    def __init__(self, model: keras.Model, batches: list[Batch], measured: Measured) -> None:
        known = [y for _, y in batches if y is not None]
        super().__init__(measured, np.concatenate(known) if len(known) == len(batches) else None)
        self.model, self.batches = model, batches
        self.norms: Norms = list(norms_within(model))
        self.live = {name: norm for name, norm in self.norms if not is_frozen(norm)}
        self.trained: set[str] = set()  # norms that are told training=True at inference
        self._values: dict[str, tuple[Array, Array]] = {}  # in place of moving statistics
        self._calls: Counter[str] = Counter()

    def outputs(self, name: str) -> list[Array]:  # noqa: ARG002 -- no progress here
        values = [(self.live[n], *of) for n, of in self._values.items()]
        found = []
        for x, _ in self.batches:
            self._calls.clear()
            found.append(as_values(outputs_of(self.model, x, values)[0]).astype(np.float64))
        return found

    def aligned(self, outputs: Array) -> tuple[Array, NDArray[np.generic] | None]:
        return _classes_first(outputs, self.labels)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        for x, _ in self.batches:
            leaves = [ops.convert_to_numpy(leaf) for leaf in keras.tree.flatten(x) if leaf is not None]
            floats = [leaf for leaf in leaves if leaf.dtype.kind == "f"]
            self.measured.is_data_broken |= not all(np.isfinite(leaf).all() for leaf in floats)
        names = {id(norm): name for name, norm in self.norms}

        def watched(layer: keras.layers.Layer, call: Call) -> Call:
            def run(*args: Any, **kwargs: Any) -> Any:
                if id(layer) in names:
                    self._receive(names[id(layer)], layer, args, kwargs)
                result = call(*args, **kwargs)
                self._look(names.get(id(layer), layer.name), args, result)
                return result

            return run

        with calls_replaced(innermost(self.model), watched):
            yield

    def by_batch(self) -> None:
        found: Found = []
        with measuring_moments(list(self.live.items()), found):
            self.score("batch")
        names = list(self.live)
        pooled = self.measured.population
        for number, packed in found:
            of = unpacked(packed)
            of = of._replace(count=float(np.max(of.count)))
            pooled[names[number]] = merge(pooled[names[number]], of) if names[number] in pooled else of

    @contextlib.contextmanager
    def replaced(self, found: Mapping[str, PooledMoments]) -> Iterator[None]:
        self._values = {name: (of.mean, of.m2 / max(of.count, 1)) for name, of in found.items()}
        try:
            yield
        finally:
            self._values = {}

    @contextlib.contextmanager
    def adapting(self) -> Iterator[None]:
        with calls_replaced(self.live.values(), _adapting):
            yield

    def statistics(self, name: str) -> tuple[Array, Array, float]:
        norm = self.live[name]
        return array(norm.moving_mean), array(norm.moving_variance), float(norm.epsilon)

    def _receive(self, name: str, norm: Norm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("inputs", "training", "mask"), args, strict=False)) | kwargs
        inputs, mask = given["inputs"], given.get("mask")
        if given.get("training"):
            self.trained.add(name)
        of = unpacked(received_by(norm, name, inputs, mask))
        values, axis = as_values(inputs).astype(np.float64), norm.axis % len(inputs.shape)
        kept = self.measured.received.setdefault(name, Received())
        call, self._calls[name] = self._calls[name], self._calls[name] + 1
        valid = None if mask is None else valid_values(mask, inputs, axis, name)
        means = _sample_means(values, axis, None if valid is None else as_values(valid))
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        of = of._replace(count=float(np.max(of.count)))
        kept.add(call, of, means, float(np.abs(values).max(initial=0.0)), dtype)

    def _look(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        is_known = self.measured.broken is not None or self.measured.is_data_broken
        if not is_known and not _are_finite(result) and _are_finite(args):
            self.measured.broken = name


def outputs_of(model: keras.Model, x: Inputs, values: list[tuple[Norm, Array, Array]]) -> list[Tensor]:
    """Return the outputs at inference, by these moving statistics; the model is as before."""

    def forward(x: Inputs) -> Any:
        with keras.StatelessScope():
            for norm, mean, var in values:
                norm.moving_mean.assign(mean)
                norm.moving_variance.assign(var)
            return model(x, training=False)

    torchs = keras.backend.backend() == "torch"
    outputs: list[Tensor] = keras.tree.flatten(in_evaluation(model, forward, x) if torchs else forward(x))
    return outputs


def as_values(tensor: Tensor) -> NDArray[Any]:
    """Return a copy of a tensor's values; of floating ones as float32."""
    is_floating = "float" in keras.backend.standardize_dtype(tensor.dtype)
    return np.array(ops.convert_to_numpy(ops.cast(tensor, "float32") if is_floating else tensor))


def innermost(model: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers without layers in them."""
    return [layer for layer in model._flatten_layers(include_self=False) if not layer._layers]


def _adapting(norm: Norm, call: Callable[..., Any]) -> Call:
    """Return the call of a norm by `Adapted`."""
    mean, var = norm.moving_mean.value, norm.moving_variance.value
    prior = Adapted().prior

    def run(inputs: Tensor, training: object = None, mask: Tensor | None = None, **kwargs: Any) -> Any:  # noqa: ARG001
        _, shift, delta, new = ops.unstack(received_by(norm, norm.name, inputs, mask), 4)
        share = inputs.shape[0] / (inputs.shape[0] + prior)
        norm.moving_mean.assign(mean + share * (shift + delta - mean))
        norm.moving_variance.assign(var + share * (new - var))
        return call(inputs, training=False, **(kwargs if mask is None else kwargs | {"mask": mask}))

    return run


def _sample_means(values: Array, axis: int, valid: NDArray[Any] | None) -> Array:
    """Return the mean of each sample and channel, `[N, C]`, of the values that count."""
    x = np.moveaxis(values, axis, -1)
    places = tuple(range(1, x.ndim - 1))
    counted = (
        np.ones_like(x) if valid is None else np.moveaxis(np.broadcast_to(valid, values.shape), axis, -1)
    )
    counts: Array = counted.sum(places)
    kept = (counts > 0).all(1)
    found: Array = np.where(counted, x, 0).sum(places)
    return found[kept] / counts[kept]


def _are_finite(values: Any) -> bool:
    leaves = [leaf for leaf in keras.tree.flatten(values) if ops.is_tensor(leaf)]
    floats = [leaf for leaf in leaves if "float" in keras.backend.standardize_dtype(leaf.dtype)]
    return all(bool(ops.convert_to_numpy(ops.all(ops.isfinite(leaf)))) for leaf in floats)


def _classes_first(
    outputs: Array, labels: NDArray[np.generic] | None
) -> tuple[Array, NDArray[np.generic] | None]:
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
