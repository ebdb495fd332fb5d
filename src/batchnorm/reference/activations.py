"""Activation functions and their derivatives, safe for every finite z.

At a kink the derivative is the one that torch takes: of relu and leaky_relu at 0 the left one, of relu6 at
0 and 6 the flat side's 0, of hardswish at -3 and 3 the outer sides' 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEAKY_RELU_SLOPE = 0.01
# Beyond this, exp(-z²/2) is zero in float64, and z² may overflow.
NORMAL_DENSITY_END = 40.0


@dataclass(frozen=True)
class Activation:
    """A function a(z) that works elementwise, and its derivative da/dz; shapes `[...]` -> `[...]`."""

    value: Callable[[Array], Array]
    derivative: Callable[[Array], Array]


def _identity(z: Array) -> Array:
    return z


def _identity_derivative(z: Array) -> Array:
    return np.ones_like(z)


def _relu(z: Array) -> Array:
    """a = max(z, 0). Source: Nair & Hinton 2010."""
    return np.maximum(z, 0.0)


def _relu_derivative(z: Array) -> Array:
    return np.where(z > 0, 1.0, 0.0)


def _relu6(z: Array) -> Array:
    """a = min(max(z, 0), 6). Source: Howard et al. 2017 (MobileNets), arXiv:1704.04861."""
    return np.clip(z, 0.0, 6.0)


def _relu6_derivative(z: Array) -> Array:
    return np.where((z > 0) & (z < 6), 1.0, 0.0)


def _leaky_relu(z: Array) -> Array:
    """a = z where z > 0, else 0.01 z. Source: Maas et al. 2013."""
    return np.where(z > 0, z, LEAKY_RELU_SLOPE * z)


def _leaky_relu_derivative(z: Array) -> Array:
    return np.where(z > 0, 1.0, LEAKY_RELU_SLOPE)


def _sigmoid(z: Array) -> Array:
    """a = 1 / (1 + e^-z), and for z < 0 the equal e^z / (1 + e^z): the exponent is never positive."""
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, e) / (1.0 + e)


def _sigmoid_derivative(z: Array) -> Array:
    """da/dz = e^-z / (1 + e^-z)² = a(z) (1 - a(z)), where 1 - a(z) = a(-z) without cancellation."""
    return _sigmoid(z) * _sigmoid(-z)


def _silu(z: Array) -> Array:
    """a = z σ(z). Source: Elfwing et al. 2017, arXiv:1702.03118."""
    return z * _sigmoid(z)


def _silu_derivative(z: Array) -> Array:
    """By the product rule da/dz = σ(z) + z σ(z) σ(-z) = σ(z) (1 + z σ(-z))."""
    return _sigmoid(z) * (1.0 + z * _sigmoid(-z))


def _normal_cdf(z: Array) -> Array:
    """Φ(z) = erfc(-z/√2) / 2, which keeps its relative accuracy in the left tail; 1 + erf would not."""
    erfc = np.vectorize(math.erfc, otypes=[np.float64])
    return np.asarray(0.5 * erfc(-z / math.sqrt(2.0)), dtype=np.float64)


def _gelu(z: Array) -> Array:
    """a = z Φ(z), the exact form. Source: Hendrycks & Gimpel 2016, arXiv:1606.08415."""
    return z * _normal_cdf(z)


def _gelu_derivative(z: Array) -> Array:
    """By the product rule da/dz = Φ(z) + z φ(z), where φ(z) = Φ'(z) = exp(-z²/2) / √(2π)."""
    near = np.clip(z, -NORMAL_DENSITY_END, NORMAL_DENSITY_END)
    return _normal_cdf(z) + near * np.exp(-0.5 * near**2) / math.sqrt(2.0 * math.pi)


def _hardswish(z: Array) -> Array:
    """a = z min(max(z + 3, 0), 6) / 6. Source: Howard et al. 2019 (MobileNetV3), arXiv:1905.02244."""
    return z * (np.clip(z + 3.0, 0.0, 6.0) / 6.0)


def _hardswish_derivative(z: Array) -> Array:
    """Between the kinks a = (z² + 3z) / 6, so da/dz = (2z + 3) / 6; outside, a = 0 and a = z."""
    middle = (2.0 * np.clip(z, -3.0, 3.0) + 3.0) / 6.0
    return np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, middle))


def _tanh(z: Array) -> Array:
    return np.tanh(z)


def _tanh_derivative(z: Array) -> Array:
    """da/dz = 1 - tanh² z = sech² z = 4 σ(2z) σ(-2z), without the cancellation of 1 - tanh²."""
    half = np.clip(z, -1e3, 1e3)
    return 4.0 * _sigmoid_derivative(2.0 * half)


def _elu(z: Array) -> Array:
    """a = z where z > 0, else e^z - 1 (alpha = 1). Source: Clevert et al. 2015, arXiv:1511.07289."""
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0.0)))


def _elu_derivative(z: Array) -> Array:
    return np.exp(np.minimum(z, 0.0))


ACTIVATIONS: dict[str | None, Activation] = {
    None: Activation(_identity, _identity_derivative),
    "relu": Activation(_relu, _relu_derivative),
    "relu6": Activation(_relu6, _relu6_derivative),
    "leaky_relu": Activation(_leaky_relu, _leaky_relu_derivative),
    "silu": Activation(_silu, _silu_derivative),
    "gelu": Activation(_gelu, _gelu_derivative),
    "hardswish": Activation(_hardswish, _hardswish_derivative),
    "sigmoid": Activation(_sigmoid, _sigmoid_derivative),
    "tanh": Activation(_tanh, _tanh_derivative),
    "elu": Activation(_elu, _elu_derivative),
}
