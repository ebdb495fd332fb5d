"""The fused activations and their derivatives against torch's own autograd, kinks included."""

from __future__ import annotations

import pytest
import torch

from batchnorm.kernels.activations import ACTIVATIONS

POINTS = torch.cat(
    [
        torch.linspace(-12, 12, 481, dtype=torch.float64),
        torch.tensor([-1e4, -50.0, -3.0, -0.0, 0.0, 3.0, 6.0, 50.0, 1e4], dtype=torch.float64),
    ]
)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_is_torchs(name: str) -> None:
    z = POINTS.clone().requires_grad_()
    value, derivative = ACTIVATIONS[name]
    (expected,) = torch.autograd.grad(value(z), z, torch.ones_like(z))
    torch.testing.assert_close(derivative(POINTS), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_is_torchs_function_of_that_name(name: str) -> None:
    stock = getattr(torch.nn.functional, name)
    torch.testing.assert_close(ACTIVATIONS[name].value(POINTS), stock(POINTS), rtol=0, atol=0)
