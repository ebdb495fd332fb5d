"""Activations and their derivatives against torch's operators in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from batchnorm.reference import ACTIVATIONS

TORCH = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    None: torch.clone,
}
KINKS = np.array([-6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0])
LARGE = np.array([20.0, 40.0, 800.0, 1e8, 1e300])
POINTS = {
    "kinks": KINKS,
    "next to kinks": np.concatenate([np.nextafter(KINKS, -np.inf), np.nextafter(KINKS, np.inf)]),
    "between": np.linspace(-8, 8, 1001),
    "large": np.concatenate([-LARGE, LARGE]),
}

every_activation = pytest.mark.parametrize("name", TORCH, ids=str)


def test_every_activation_is_compared() -> None:
    assert set(TORCH) == set(ACTIVATIONS)


@every_activation
@pytest.mark.parametrize("points", POINTS)
def test_value_and_derivative_are_those_of_torch(name: str | None, points: str) -> None:
    z = torch.from_numpy(POINTS[points]).requires_grad_()
    value = TORCH[name](z)
    (derivative,) = torch.autograd.grad(value, z, torch.ones_like(z))
    ours = ACTIVATIONS[name]
    assert_same(ours.value(POINTS[points]), value)
    assert_same(ours.derivative(POINTS[points]), derivative)


@every_activation
def test_shape_is_kept(name: str | None) -> None:
    for shape in ((), (0,), (0, 3), (2, 1, 3)):
        z = np.full(shape, 0.7)
        assert np.shape(ACTIVATIONS[name].value(z)) == shape
        assert np.shape(ACTIVATIONS[name].derivative(z)) == shape


def test_left_tails_keep_their_relative_accuracy() -> None:
    # From the leading terms of the expansions for z -> -inf: Φ(z) = φ(z) / |z| (1 - 1/z² + 3/z⁴ - ...).
    z = np.array([-30.0])
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    series = 1 - z**-2 + 3 * z**-4 - 15 * z**-6
    np.testing.assert_allclose(ACTIVATIONS["gelu"].value(z), -density * series, rtol=1e-9, atol=0)
    np.testing.assert_allclose(ACTIVATIONS["sigmoid"].value(z), np.exp(z), rtol=1e-12, atol=0)
    np.testing.assert_allclose(ACTIVATIONS["tanh"].derivative(z), 4 * np.exp(2 * z), rtol=1e-12, atol=0)


def assert_same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    """Raise unless both agree to a few roundings; torch's tails are relative to 1, not to their own size."""
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-14, atol=2e-15)
