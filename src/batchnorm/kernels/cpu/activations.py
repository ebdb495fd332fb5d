"""Computes the activations and their derivatives, on vectors.

relu and relu6 are two bounds; each of the others has a code. In float32 the absolute error is a few 1e-7: exp
is a polynomial, and erf is Abramowitz & Stegun's formula 7.1.26 (Handbook of Mathematical Functions, 1964),
whose error is up to 1.5e-7.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import overload

from .vector import (
    DOUBLES,
    erf_by_lane,
    exp_by_lane,
    function,
    has_simple_features,
    multiply_add,
    power_of_two,
    splat,
    where_less,
    where_not_more,
)

IDENTITY, CLAMP, LEAKY_RELU, SILU, GELU, HARDSWISH, SIGMOID, TANH, ELU = range(9)
CODES = {
    None: IDENTITY,
    "relu": CLAMP,
    "relu6": CLAMP,
    "leaky_relu": LEAKY_RELU,
    "silu": SILU,
    "gelu": GELU,
    "hardswish": HARDSWISH,
    "sigmoid": SIGMOID,
    "tanh": TANH,
    "elu": ELU,
}
BOUNDS = {"relu": (0.0, math.nan), "relu6": (0.0, 6.0)}

_SLOPE = 0.01  # of leaky_relu
_LOG2_E = 1 / math.log(2)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is log(2); the first has few bits
_ROUND = 1.5 * 2.0**23  # a number plus this minus this is rounded to an integer
_LARGEST, _SMALLEST = 88.3, -87.3  # exponents of float32's normal numbers
_EXP = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2)
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_ERF_P = 0.3275911


def exp(values: Any) -> Any:
    """Returns e to the power of each of a vector's numbers."""
    raise NotImplementedError(values)  # kernels call the overload below


def erf(values: Any) -> Any:
    """Returns the error function of each of a vector's numbers."""
    raise NotImplementedError(values)  # kernels call the overload below


@function
def _exp(x: Any) -> Any:
    x = where_less(splat(_LARGEST, np.float32), x, splat(_LARGEST, np.float32), x)
    x = where_less(x, splat(_SMALLEST, np.float32), splat(_SMALLEST, np.float32), x)
    far = splat(_ROUND, np.float32)
    whole = multiply_add(x, splat(_LOG2_E, np.float32), far) - far
    part = multiply_add(whole, splat(-_LN2_HIGH, np.float32), x)
    part = multiply_add(whole, splat(-_LN2_LOW, np.float32), part)
    series = splat(_EXP[0], np.float32)
    for coefficient in _EXP[1:]:
        series = multiply_add(series, part, splat(coefficient, np.float32))
    one = splat(1.0, np.float32)
    return multiply_add(series * part, part, part + one) * power_of_two(whole)


@function
def _erf(x: Any) -> Any:
    zero, one = splat(0.0, np.float32), splat(1.0, np.float32)
    size = where_less(x, zero, zero - x, x)
    t = one / multiply_add(size, splat(_ERF_P, np.float32), one)
    series = splat(_ERF[0], np.float32)
    for coefficient in _ERF[1:]:
        series = multiply_add(series, t, splat(coefficient, np.float32))
    found = one - series * t * _exp(zero - size * size)
    return where_less(x, zero, zero - found, found)


@overload(exp)
def _exp_of(values: Any) -> Any:
    def wide(values: Any) -> Any:
        return exp_by_lane(values)

    def narrow(values: Any) -> Any:
        return _exp(values)

    return wide if values == DOUBLES else narrow


@overload(erf)
def _erf_of(values: Any) -> Any:
    def wide(values: Any) -> Any:
        return erf_by_lane(values)

    def narrow(values: Any) -> Any:
        return _erf(values)

    return wide if values == DOUBLES else narrow


@function
def _sigmoid(z: Any, real: Any) -> Any:
    one = splat(1.0, real)
    return one / (one + exp(splat(0.0, real) - z))


@function
def _normal(z: Any, real: Any) -> Any:
    """Returns the normal distribution's probability of a value below z."""
    return splat(0.5, real) * (splat(1.0, real) + erf(z * splat(math.sqrt(0.5), real)))


@function
def bounded(z: Any, low: Any, high: Any) -> Any:
    """Returns z, clamped to low..high; a bound that is NaN does not clamp."""
    z = where_not_more(z, low, low, z)
    return where_less(high, z, high, z)


@function
def within(dy: Any, z: Any, low: Any, high: Any, real: Any) -> Any:
    """Returns dy where z is between low and high, and 0 elsewhere."""
    zero = splat(0.0, real)
    dy = where_not_more(z, low, zero, dy)
    return where_not_more(high, z, zero, dy)


@function
def activated(z: Any, code: Any, low: Any, high: Any, real: Any) -> Any:
    """Returns activation(z); low and high are the bounds of one that has these only."""
    if code == IDENTITY:
        return z
    zero, one = splat(0.0, real), splat(1.0, real)
    if code == CLAMP:
        return bounded(z, low, high)
    if code == LEAKY_RELU:
        return where_less(z, zero, z * splat(_SLOPE, real), z)
    if code == SILU:
        return z * _sigmoid(z, real)
    if code == GELU:
        return z * _normal(z, real)
    if code == HARDSWISH:
        six = splat(6.0, real)
        gate = z + splat(3.0, real)
        gate = where_less(gate, zero, zero, gate)
        return z * where_less(six, gate, six, gate) * splat(1 / 6, real)
    if code == SIGMOID:
        return _sigmoid(z, real)
    if code == TANH:
        return one - splat(2.0, real) / (one + exp(z * splat(2.0, real)))
    return where_less(zero, z, z, exp(where_less(zero, z, zero, z)) - one)


@function
def through(dy: Any, z: Any, code: Any, low: Any, high: Any, real: Any) -> Any:
    """Returns dy * activation'(z); at a kink, the slope of torch's own backward."""
    zero, one = splat(0.0, real), splat(1.0, real)
    if code == CLAMP:
        return within(dy, z, low, high, real)
    if code == LEAKY_RELU:
        return where_less(zero, z, dy, dy * splat(_SLOPE, real))
    if code == SILU:
        s = _sigmoid(z, real)
        return dy * s * multiply_add(z, one - s, one)
    if code == GELU:
        density = exp(z * z * splat(-0.5, real)) * splat(1 / math.sqrt(2 * math.pi), real)
        return dy * multiply_add(z, density, _normal(z, real))
    if code == HARDSWISH:
        three = splat(3.0, real)
        slope = multiply_add(z, splat(1 / 3, real), splat(0.5, real))
        slope = where_less(z, three, slope, one)
        return dy * where_not_more(z, zero - three, zero, slope)
    if code == SIGMOID:
        s = _sigmoid(z, real)
        return dy * s * (one - s)
    if code == TANH:
        t = one - splat(2.0, real) / (one + exp(z * splat(2.0, real)))
        return dy * (one - t * t)
    return where_less(zero, z, dy, dy * exp(where_less(zero, z, zero, z)))


def activated_if_full(z: Any, code: Any, low: Any, high: Any, variant: Any) -> Any:
    """Returns activation(z). A SIMPLE kernel has bounds only, and compiles no other activation."""
    raise NotImplementedError(z, code, low, high, variant)  # kernels call the overload below


def through_if_full(dy: Any, z: Any, code: Any, low: Any, high: Any, variant: Any) -> Any:
    """Returns dy * activation'(z); as `activated_if_full`."""
    raise NotImplementedError(dy, z, code, low, high, variant)  # kernels call the overload below


@overload(activated_if_full)
def _activated(z: Any, code: Any, low: Any, high: Any, variant: Any) -> Any:  # noqa: ARG001
    def simple(z: Any, code: Any, low: Any, high: Any, variant: Any) -> Any:  # noqa: ARG001
        return bounded(z, low, high)

    def full(z: Any, code: Any, low: Any, high: Any, variant: Any) -> Any:
        return activated(z, code, low, high, variant.real)

    return simple if has_simple_features(variant) else full


@overload(through_if_full)
def _through(dy: Any, z: Any, code: Any, low: Any, high: Any, variant: Any) -> Any:  # noqa: ARG001
    def simple(dy: Any, z: Any, code: Any, low: Any, high: Any, variant: Any) -> Any:  # noqa: ARG001
        return within(dy, z, low, high, variant.real)

    def full(dy: Any, z: Any, code: Any, low: Any, high: Any, variant: Any) -> Any:
        return through(dy, z, code, low, high, variant.real)

    return simple if has_simple_features(variant) else full
