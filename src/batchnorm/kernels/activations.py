"""Defines the activations that a layer can apply in the same pass, and their derivatives, on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# The largest numbers that round to 0, by dtype: where y rounds to 0, the derivative of relu is 0.
TINY = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


class Activation(NamedTuple):
    """An elementwise function and its derivative.

    Attributes:
        value: z -> activation(z). One stock torch function, so that an exported graph holds stock operators.
        derivative: z -> activation'(z); at a kink, what torch's own backward takes.
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _between(z: Tensor, low: float, high: float) -> Tensor:
    return ((z > low) & (z < high)).to(z.dtype)


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _gelu_derivative(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * torch.erfc(-z * math.sqrt(0.5)) + z * density


def _hardswish_derivative(z: Tensor) -> Tensor:
    return torch.where(z <= -3, torch.zeros_like(z), torch.where(z < 3, z / 3 + 0.5, torch.ones_like(z)))


def _sigmoid_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, lambda z: torch.sign(z).clamp_(min=0)),
    "relu6": Activation(F.relu6, lambda z: _between(z, 0, 6)),
    "leaky_relu": Activation(F.leaky_relu, lambda z: torch.where(z > 0, torch.ones_like(z), 0.01)),
    "silu": Activation(F.silu, _silu_derivative),
    "gelu": Activation(F.gelu, _gelu_derivative),
    "hardswish": Activation(F.hardswish, _hardswish_derivative),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_derivative),
    "tanh": Activation(torch.tanh, lambda z: 1 - torch.tanh(z).square()),
    "elu": Activation(F.elu, lambda z: torch.where(z > 0, torch.ones_like(z), torch.exp(z.clamp(max=0)))),
}
