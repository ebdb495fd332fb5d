"""Row 35: the functional form takes any channel axis."""

from __future__ import annotations

import pytest
import torch

import batchnorm
from batchnorm import functional
from batchnorm.errors import OptionError


@pytest.mark.parametrize("axis", [1, 2, -1, 3, -2])
def test_row_35_any_channel_axis(axis: int) -> None:
    """Row 35: output, gradients and running statistics are those with the axis moved to the second place."""
    x, residual, dy = (torch.randn(3, 4, 5, 6, dtype=torch.float64) + 1 for _ in range(3))
    channels, keep = x.shape[axis], [s for i, s in enumerate(x.shape) if i != axis % 4]
    mask = torch.rand(keep) > 0.3
    found = []
    for place in (axis, 1):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        moved = leaves if place == axis else [t.movedim(axis, 1) for t in leaves]
        mean, var = torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
        weight = torch.linspace(0.5, 2, channels, dtype=torch.float64)
        y = functional.batch_norm(
            moved[0], mean, var, weight, None, True, residual=moved[1], activation="silu", mask=mask,
            statistics=batchnorm.Ghost(2), axis=place,
        )  # fmt: skip
        y = y if place == axis else y.movedim(1, axis)
        y.backward(dy)
        found.append((y.detach(), mean, var, *(leaf.grad for leaf in leaves)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert found[0][0].shape == x.shape


@pytest.mark.parametrize("axis", [0, 4, -4, -5, 2.0, None])
def test_row_35_no_channel_axis(axis: object) -> None:
    """Row 35: the batch's axis, and what is no axis, are refused."""
    with pytest.raises(OptionError, match=r"axis must be one of the input's 4 dimensions, and not the first"):
        functional.batch_norm(torch.randn(3, 4, 5, 6), None, None, training=True, axis=axis)
