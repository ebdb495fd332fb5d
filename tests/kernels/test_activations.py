"""The fused activations and their derivatives against torch's own autograd, kinks included."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import batchnorm
from batchnorm import conventions, kernels, reference
from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.kernels.cpu.activations import CODES
from batchnorm.models.norms.activations import FUNCTIONS

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


# The GPU engine compares strings: once in the activation, once in its derivative.
IN_TRITON = re.findall(
    r'ACTIVATION == "(\w+)"', (Path(kernels.__file__).parent / "gpu/activations.py").read_text()
)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([name for name in reference.ACTIVATIONS if name], id="reference"),
        pytest.param([name for name in CODES if name], id="CPU engine"),
        pytest.param(sorted(IN_TRITON)[::2], id="GPU engine"),
        pytest.param(sorted(IN_TRITON)[1::2], id="GPU engine, derivatives"),
        pytest.param(FUNCTIONS, id="fuse"),
        pytest.param([*conventions.ACTIVATIONS, "leaky_relu"], id="Keras but leaky_relu, of another slope"),
    ],
)
def test_every_table_has_the_same_names(names: Iterable[str]) -> None:
    assert sorted(names) == sorted(ACTIVATIONS)


@pytest.mark.parametrize("where", [batchnorm.BatchNorm2d, batchnorm.functional.batch_norm])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_documentation_names_it(name: str, where: object) -> None:
    assert re.search(rf"\b{name}\b", where.__doc__ or "")
