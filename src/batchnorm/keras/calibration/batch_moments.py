"""Measures what every batch normalization of a model receives from one batch: its moments, per channel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import keras
import numpy as np
from keras import ops

from batchnorm.keras.batch_layout import split, valid_values
from batchnorm.keras.moments import moments, wide
from batchnorm.keras.norms import Norm, Norms
from batchnorm.keras.protocols import Tensor
from batchnorm.keras.replaced_calls import Call, calls_replaced
from batchnorm.statistics.moments import PooledMoments

from .batches import Inputs

# Of each call of a layer: its number, and count, shift, delta and var of what it received, `[4, C]`.
Found = list[tuple[int, Tensor]]
Forward = Callable[[Inputs], Found]


class BatchMoments:
    """Runs a model as in inference, but for some of its normalizations, which normalize by the batch.

    Nothing of the model changes: the forward runs in a `keras.StatelessScope`, where a value that a layer
    assigns to a variable (the batch's statistics; a recurrent state, a random seed) lives until the forward
    ends. It is compiled once per shape of input where the backend compiles and the model is not
    `run_eagerly`.

    Args:
        model: built.
        norms: (name, layer) of those to measure.
    """

    def __init__(self, model: keras.Model, norms: Norms) -> None:
        self.model = model
        self.norms = tuple(norms)
        self._run = _compiled(model, self._forward)

    def __call__(self, x: Inputs) -> list[tuple[int, PooledMoments]]:
        """Return, for each call of a layer, in their order, its number in `norms` and what it received.

        Moments are NumPy float64, `[C]`.
        """
        return [(int(number), unpacked(packed)) for number, packed in self._run(x)]

    def serves(self, model: keras.Model, norms: Norms) -> bool:
        """Whether this is what a new one for these would be."""
        return self.model is model and self.norms == tuple(norms)

    def _forward(self, x: Inputs) -> Found:
        found: Found = []
        with measuring_moments(self.norms, found):
            self.model(x, training=False)
        return found


def unpacked(packed: Tensor) -> PooledMoments:
    count, shift, delta, var = ops.convert_to_numpy(packed).astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf, where sums overflow: the caller refuses NaN
        return PooledMoments(count, shift + delta, var * count)


def received_by(layer: Norm, label: str, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return count, shift, delta and var of what a layer receives, `[4, C]`; `label`: its name in errors."""
    axis = layer.axis % len(inputs.shape)
    batch = split(wide(inputs), valid_values(mask, inputs, axis, label), axis, size=None)
    return ops.stack([ops.reshape(value, (-1,)) for value in moments(batch.x, batch.axes, batch.valid)])


def measuring_moments(norms: Norms, found: Found) -> AbstractContextManager[None]:
    """Let each layer append what it receives to `found`, and normalize by it, within this context.

    Stock layers have no hook.
    """
    numbers = {id(layer): number for number, (_, layer) in enumerate(norms)}

    def measuring(layer: keras.layers.Layer, call: Call) -> Call:
        number = numbers[id(layer)]
        label = f"{norms[number][0]} ({type(layer).__name__})"
        return functools.partial(_measure, layer, label, call, number, found)

    return calls_replaced([layer for _, layer in norms], measuring)


def _measure(
    layer: Norm,
    label: str,
    call: Callable[..., Tensor],
    number: int,
    found: Found,
    inputs: Tensor,
    training: bool | None = None,  # noqa: ARG001 -- as in inference, whatever the model says
    mask: Tensor | None = None,
    **kwargs: object,
) -> Tensor:
    """Return what `call`, the layer's own, gives with the moments of its inputs as moving statistics.

    Args:
        layer: as it is in the model.
        label: its name in errors.
        call: its `call`, without `training`.
        number: of the layer, in `found`.
        found: takes the moments.
        inputs, training, mask, **kwargs: arguments of a call of the layer.
    """
    received = received_by(layer, label, inputs, mask)
    _, shift, delta, var = ops.unstack(received, 4)
    layer.moving_mean.assign(shift + delta)
    layer.moving_variance.assign(var)
    found.append((number, received))
    if mask is not None:
        kwargs["mask"] = mask
    return call(inputs, training=False, **kwargs)


def _compiled(model: keras.Model, forward: Forward) -> Forward:
    """Return `forward` as the backend runs it best, without gradients and without effect on any variable."""

    def stateless(x: Inputs) -> Found:
        with keras.StatelessScope():
            return forward(x)

    backend, eager = keras.backend.backend(), bool(getattr(model, "run_eagerly", False))
    if backend == "torch":
        return lambda x: in_evaluation(model, stateless, x)
    if backend == "jax" and not eager and getattr(model, "jit_compile", True):
        return _jitted(model, forward)
    if backend == "tensorflow" and not eager:
        import tensorflow as tf

        compiled: Forward = tf.function(stateless, autograph=False, reduce_retracing=True)
        return compiled
    return stateless


def in_evaluation(model: keras.Model, forward: Forward, x: Inputs) -> Found:
    """Run a forward of torch, for the time of which the modules inside the model are in evaluation mode."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            return forward(x)
    finally:
        for module, training in modes:
            module.training = training


def _jitted(model: keras.Model, forward: Forward) -> Forward:
    """Return a forward that JAX compiles, with the weights as arguments, not as constants.

    They are not donated, as `predict_on_batch` does it: an interruption before the new values return would
    lose them.
    """
    import jax

    @jax.jit
    def run(values: list[Tensor], x: Inputs) -> Found:
        with keras.StatelessScope(state_mapping=list(zip(model.variables, values, strict=True))):
            return forward(x)

    return lambda x: run([variable.value for variable in model.variables], x)
