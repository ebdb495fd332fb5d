"""The same layer in JAX, jitted: the plain formula, compiled by XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from torch import Tensor

from .layer_cases import Case

EPS, MOMENTUM = 1e-5, 0.1


def step(case: Case, x: Tensor, dy: Tensor, residual: Tensor | None) -> Callable[[], object]:
    """Return a jitted step that waits for its results; channels-last is `[N, *S, C]`, as JAX has it."""
    axis = len(case.shape) - 1 if case.layout == "channels-last" else 1

    def array(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        return jnp.asarray(tensor.detach().movedim(1, axis).float().numpy(), dtype=case.dtype)

    channels = case.shape[1]
    ones, zeros = jnp.ones(channels), jnp.zeros(channels)
    inputs = (array(x), array(residual), ones, zeros)
    running = (zeros, ones)
    wait: Callable[[object], object] = jax.block_until_ready
    if case.evaluation:
        evaluate = jax.jit(lambda inputs, running: _forward(case, axis, inputs, running)[0])
        return lambda: wait(evaluate(inputs, running))
    cotangent = array(dy)
    train = jax.jit(lambda dy, inputs, running: _train(case, axis, dy, inputs, running))
    return lambda: wait(train(cotangent, inputs, running))


def _forward(case: Case, axis: int, inputs: Any, running: Any) -> Any:
    """Return y, and the mean and variance that it was normalized by."""
    x, residual, weight, bias = inputs
    over = tuple(number for number in range(x.ndim) if number != axis)
    along = tuple(-1 if number == axis else 1 for number in range(x.ndim))
    wide = x.astype(jnp.float32)
    mean, var = running if case.evaluation else (wide.mean(over), wide.var(over))
    scale = weight * jax.lax.rsqrt(var + EPS)
    y = (wide - mean.reshape(along)) * scale.reshape(along) + bias.reshape(along)
    if residual is not None:
        y = y + residual
    if case.activation:
        y = jax.nn.relu(y)
    return y.astype(case.dtype), (mean, var)


def _train(case: Case, axis: int, dy: Any, inputs: Any, running: Any) -> Any:
    """Return y, the gradients of `inputs`, and the running statistics moved."""
    y, pull_back, batch = jax.vjp(lambda inputs: _forward(case, axis, inputs, running), inputs, has_aux=True)
    moved = [old + MOMENTUM * (new - old) for old, new in zip(running, batch, strict=True)]
    return y, pull_back(dy), moved
