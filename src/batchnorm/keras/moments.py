"""Computes moments by `keras.ops`: float32, accurate for any |mean|/std, differentiable to any order.

The mean is a pair: `shift`, the mean rounded to the dtype, and `delta`, the rest. Then x - shift is exact to
its own last bit, and |delta| is far below std, so that

    mean = shift + delta        delta = E[x - shift]        var = E[(x - shift)²] - delta²
    y    = (x - shift) * scale + (bias - delta * scale),    scale = weight / sqrt(var + eps)

lose nothing to cancellation, which E[x²] - E[x]² and x * scale - mean * scale do. `shift` is a constant to
the gradient: mean and var do not depend on it. That takes as many passes over x as the stock layer does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import keras
from keras import ops

from .protocols import Tensor

# TensorFlow adds up an axis one value after the other, also in XLA's CPU code, where JAX adds in a tree: the
# sum of 200,000 values is off by 1e-5 of itself. Axis by axis no sum is longer than the longest axis.
_ADDS_IN_ORDER = keras.backend.backend() == "tensorflow"


class Moments(NamedTuple):
    """Moments per channel; each has the rank of x, with 1 for every reduced axis, or is a table `[G, C]`.

    Attributes:
        count: number of values; inexact beyond 2²⁴.
        shift: the mean, rounded; a constant to the gradient.
        delta: mean - shift.
        var: biased, ÷ count; 0 where count is 0.
    """

    count: Tensor
    shift: Tensor
    delta: Tensor
    var: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean, rounded to the dtype."""
        return self.shift + self.delta


def wide(x: Tensor) -> Tensor:
    """Return x in the dtype that moments are taken in: float32, or its own float64."""
    if keras.backend.standardize_dtype(x.dtype) == "float64":  # which Keras's `result_type` forgets on torch
        return x
    return ops.cast(x, keras.backend.result_type(x.dtype, "float32"))


def moments(x: Tensor, axes: tuple[int, ...], valid: Tensor | None = None) -> Moments:
    """Return the moments of x over `axes`.

    Args:
        x: floating tensor.
        axes: the axes to reduce, in rising order; one or more.
        valid: bool, broadcasts against x, True = the value counts; None = all count. Other values have no
            effect, NaN included.
    """
    size = ops.cast(math.prod(ops.shape(x)[axis] for axis in axes), x.dtype)
    count: Tensor = size
    if valid is not None:
        valid = ops.broadcast_to(valid, ops.shape(x))
        count = ops.sum(ops.cast(valid, x.dtype), axis=axes, keepdims=True)
    share = 1.0 if valid is None else ops.where(count > 0, count, ops.ones_like(count)) / size

    def mean(values: Tensor) -> Tensor:
        if valid is not None:
            values = ops.where(valid, values, ops.zeros_like(values))
        return _mean(values, axes, share)

    start = _start(x, axes, valid, count)
    shift = ops.stop_gradient(mean(x) if start is None else start + mean(x - start))
    deviation = x - shift
    delta = mean(deviation)
    var = mean(ops.square(deviation)) - ops.square(delta)
    # Not `maximum`: on torch, Keras's makes float32 of float64.
    return Moments(count + ops.zeros_like(shift), shift, delta, ops.relu(var))


def union(parts: Moments) -> Moments:
    """Return the moments of the union of all parts along the first axis, any of which may have count 0.

    With n = Σ n_k, and each mean_k = shift_k + delta_k kept as a pair:

        mean = Σ n_k mean_k / n        var = Σ n_k (var_k + (mean_k - mean)²) / n

    Source: Chan, Golub & LeVeque, The American Statistician 37 (1983).
    """
    count, shift, delta, var = parts
    total = ops.sum(count, axis=0)
    share = count / ops.where(total > 0, total, ops.ones_like(total))
    center = ops.stop_gradient(ops.sum(share * shift, axis=0))
    apart = (shift - center) + delta
    delta = ops.sum(share * apart, axis=0)
    var = ops.sum(share * (var + ops.square(apart - delta)), axis=0)
    return Moments(total, center, delta, var)


def normalize(x: Tensor, found: Moments, scale: Tensor, bias: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return (x - mean) * scale + bias; scale and bias `[..., C, ...]` as the moments are."""
    return (x - found.shift) * spread(scale, x, axes) + spread(bias - found.delta * scale, x, axes)


def spread(values: Tensor, x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return `values`, which have length 1 on `axes`, ready to broadcast against x.

    The gradient is a sum over `axes`, which goes one axis at a time, to be as accurate as a mean. The factors
    ½ and 2 change no bit, and keep XLA from merging those sums into one.
    """
    if not _ADDS_IN_ORDER:
        return values
    shape = list(ops.shape(values))
    for axis in axes[:-1]:
        shape[axis] = ops.shape(x)[axis]
        values = ops.broadcast_to(values * 0.5, shape) * 2.0
    return values


def _mean(x: Tensor, axes: tuple[int, ...], share: Tensor) -> Tensor:
    """Return the mean over `axes`, which keep length 1, divided by `share`.

    The last step divides first and then adds. A compiler may compute a quotient again at each use, and round
    it differently there (by a fused multiply-add, say); it computes a sum once. `shift` serves its purpose
    only if all its uses agree in the last bit. A sum of one value is no sum to a compiler, so the last axis
    is one with more values: a batch may be one sample.
    """
    first = next((axis for axis in axes if x.shape[axis] != 1), axes[0])
    others = [axis for axis in axes if axis != first]
    if _ADDS_IN_ORDER:
        for axis in reversed(others):
            x = ops.mean(x, axis=axis, keepdims=True)
    elif others:
        # Not `mean`: on torch, Keras's takes float64 for float32.
        size = ops.cast(math.prod(ops.shape(x)[axis] for axis in others), x.dtype)
        x = ops.sum(x, axis=tuple(others), keepdims=True) / size
    return ops.sum(x / (ops.cast(ops.shape(x)[first], x.dtype) * share), axis=first, keepdims=True)


def _start(x: Tensor, axes: tuple[int, ...], valid: Tensor | None, count: Tensor) -> Tensor | None:
    """Return a value of each channel to subtract before a long axis is added up in order; None elsewhere."""
    if not _ADDS_IN_ORDER or len(axes) > 1:
        return None
    if valid is None:
        start = ops.sum(x[:1] if axes == (0,) else x[:, :1], axis=axes, keepdims=True)
    else:
        start = ops.max(ops.where(valid, x, -math.inf), axis=axes, keepdims=True)
        start = ops.where(count > 0, start, ops.zeros_like(start))
    return ops.stop_gradient(start)
