"""Computes the activations and their derivatives, on tiles, as `kernels/activations.py` in torch."""

from __future__ import annotations

import math

import triton
import triton.language as tl

_SLOPE = tl.constexpr(0.01)  # of leaky_relu
_ROOT = tl.constexpr(math.sqrt(0.5))
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))  # of the normal distribution, at its mean


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _normal(z):
    """Returns the normal distribution's probability of a value below z."""
    return 0.5 * (1.0 + tl.erf(z * _ROOT))


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """Returns activation(z). Comparisons are chosen so that NaN stays NaN."""
    if ACTIVATION is None:
        y = z
    elif ACTIVATION == "relu":
        y = tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == "relu6":
        y = tl.where(z <= 0.0, 0.0, tl.where(z >= 6.0, 6.0, z))
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z < 0.0, z * _SLOPE, z)
    elif ACTIVATION == "silu":
        y = z * _sigmoid(z)
    elif ACTIVATION == "gelu":
        y = z * _normal(z)
    elif ACTIVATION == "hardswish":
        gate = z + 3.0
        y = z * tl.where(gate <= 0.0, 0.0, tl.where(gate >= 6.0, 6.0, gate)) * (1 / 6)
    elif ACTIVATION == "sigmoid":
        y = _sigmoid(z)
    elif ACTIVATION == "tanh":
        y = 1.0 - 2.0 / (1.0 + tl.exp(z * 2.0))
    else:
        tl.static_assert(ACTIVATION == "elu")
        y = tl.where(z > 0.0, z, tl.exp(tl.where(z > 0.0, 0.0, z)) - 1.0)
    return y


@triton.jit
def through(dy, z, ACTIVATION: tl.constexpr, KINK: tl.constexpr):
    """Returns dy * activation'(z); at a kink, the slope of torch's own backward.

    Args:
        dy, z: tiles.
        ACTIVATION: name of the activation.
        KINK: the largest z that the dtype of y rounds to 0: where y is 0, relu has a slope of 0.
    """
    kink = tl.full([1, 1], KINK, z.dtype)  # Triton would take a subnormal Python number for float64
    if ACTIVATION == "relu":
        dz = tl.where(z <= kink, 0.0, dy)
    elif ACTIVATION == "relu6":
        dz = tl.where(z <= kink, 0.0, tl.where(z >= 6.0, 0.0, dy))
    elif ACTIVATION == "leaky_relu":
        dz = tl.where(z > 0.0, dy, dy * _SLOPE)
    elif ACTIVATION == "silu":
        s = _sigmoid(z)
        dz = dy * s * tl.fma(z, 1.0 - s, 1.0)
    elif ACTIVATION == "gelu":
        dz = dy * tl.fma(z * _DENSITY, tl.exp(z * z * -0.5), _normal(z))
    elif ACTIVATION == "hardswish":
        dz = dy * tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, (z + 1.5) * (1 / 3), 1.0))
    elif ACTIVATION == "sigmoid":
        s = _sigmoid(z)
        dz = dy * s * (1.0 - s)
    elif ACTIVATION == "tanh":
        t = 1.0 - 2.0 / (1.0 + tl.exp(z * 2.0))
        dz = dy * tl.fma(-t, t, 1.0)
    else:
        tl.static_assert(ACTIVATION == "elu")
        dz = tl.where(z > 0.0, dy, dy * tl.exp(tl.where(z > 0.0, 0.0, z)))
    return dz
