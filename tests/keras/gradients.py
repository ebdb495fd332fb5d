"""One way to differentiate a layer on every backend: the output and its gradients for a given cotangent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Results(NamedTuple):
    """The outputs and gradients of a layer for an input and a cotangent; `[C]` for the parameters'."""

    y: Array
    dx: Array
    dgamma: Array | None
    dbeta: Array | None


def results(layer: Any, x: Array, dy: Array, *, compiled: bool = False, **call: Any) -> Results:
    """Run a built layer forward and backward; moving statistics move as they do in a training step.

    Args:
        layer: a built layer.
        x: input.
        dy: cotangent of the output, in whose dtype it is taken.
        compiled: by XLA on TensorFlow and JAX; on torch, the layer's `call` by torch.compile's tracer.
        call: further arguments of the layer's call.
    """
    found = _RUNS[keras.backend.backend()](layer, x, dy, compiled, call)
    named = dict(zip([variable.name for variable in layer.trainable_variables], found[2:], strict=True))
    return Results(found[0], found[1], named.get("gamma"), named.get("beta"))


def _tensorflow(layer: Any, x: Array, dy: Array, compiled: bool, call: dict[str, Any]) -> list[Array]:
    import tensorflow as tf

    weights = [variable.value for variable in layer.trainable_variables]

    def run(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **call)
        return [y, *tape.gradient(y, [x, *weights], tf.cast(dy, y.dtype))]

    function = tf.function(run, jit_compile=True) if compiled else run
    return [tensor.numpy() for tensor in function(tf.constant(x), tf.constant(dy))]


def _jax(layer: Any, x: Array, dy: Array, compiled: bool, call: dict[str, Any]) -> list[Array]:
    import jax

    def run(weights: Any, state: Any, x: Any, dy: Any) -> Any:
        def forward(x: Any, weights: Any) -> Any:
            return layer.stateless_call(weights, state, x, **call)

        y, pull_back, moved = jax.vjp(forward, x, weights, has_aux=True)
        dx, dweights = pull_back(dy.astype(y.dtype))
        return [y, dx, *dweights], moved

    weights = [variable.value for variable in layer.trainable_variables]
    state = [variable.value for variable in layer.non_trainable_variables]
    function: Callable[..., Any] = jax.jit(run) if compiled else run
    found, moved = function(weights, state, x, dy)
    for variable, value in zip(layer.non_trainable_variables, moved, strict=True):
        variable.assign(value)
    return [np.asarray(value) for value in found]


def _torch(layer: Any, x: Array, dy: Array, compiled: bool, call: dict[str, Any]) -> list[Array]:
    import torch

    tensor = torch.tensor(x, requires_grad=True)
    weights = [variable.value for variable in layer.trainable_variables]
    function = torch.compile(layer.call, backend="eager") if compiled else layer
    y = function(tensor, **call)
    gradients = torch.autograd.grad(y, [tensor, *weights], torch.tensor(dy).to(y.dtype))
    found = [value.detach() for value in (y, *gradients)]
    return [(value.float() if value.dtype == torch.bfloat16 else value).numpy() for value in found]


_RUNS = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
