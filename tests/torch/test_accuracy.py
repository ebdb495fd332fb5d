"""The accuracy contract: within 2e-6 of the float64 reference for |mean|/std up to 1e6, in every layout.

The measure is |ours - reference| / (1 + max |reference|), with dx in units of 1/std.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import functional, reference
from tests.torch.twins import relaid, scramble, step

CONTRACT = 2e-6
LAYOUTS = ["contiguous", "strided", "batch_last", "channels_last"]
SHAPE = (16, 4, 24, 24)


def expected_of(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Return the reference's output, gradients and moved running statistics, and std, `[1, C, 1, 1]`."""
    arrays = [t.detach().double().numpy() for t in (x, layer.weight, layer.bias)]
    forward = reference.forward(*arrays, eps=layer.eps)
    backward = reference.backward(arrays[0], dy.double().numpy(), *arrays[1:], eps=layer.eps)
    before = reference.Running(layer.running_mean.double().numpy(), layer.running_var.double().numpy())
    moved = reference.update_running_torch(
        before, forward.mean[0], forward.var[0], float(forward.count[0]), momentum=layer.momentum
    )
    found = {
        "y": forward.y,
        "dx": backward.dx,
        "dweight": backward.dweight,
        "dbias": backward.dbias,
        "running_mean": moved.mean,
        "running_var": moved.var,
        "std": (1 / forward.rstd).reshape(1, -1, *[1] * (x.dim() - 2)),
    }
    return {name: torch.from_numpy(array) for name, array in found.items()}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the contract's measure for each quantity."""
    measured = {}
    for name in ("y", "dx", "dweight", "dbias", "running_mean", "running_var"):
        ours, theirs = found[name].double(), expected[name]
        if name == "dx":
            ours, theirs = ours * expected["std"], theirs * expected["std"]
        measured[name] = float((ours - theirs).abs().max() / (1 + theirs.abs().max()))
    return measured


def offset_data(offset: float) -> tuple[Tensor, Tensor]:
    return torch.randn(SHAPE) + offset, torch.randn(SHAPE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5, 1e6])
def test_row_17_mean_far_above_std(offset: float, layout: str) -> None:
    """Row 17: no cancellation, in any layout, in output, gradients and statistics."""
    x, dy = (relaid(tensor, layout) for tensor in offset_data(offset))
    layer = scramble(batchnorm.BatchNorm2d(SHAPE[1]))
    expected = expected_of(layer, x, dy)
    measured = errors(step(layer, x, dy), expected)
    assert max(measured.values()) <= CONTRACT, measured


@pytest.mark.parametrize(("offset", "layout"), [(1e3, "channels_last"), (1e5, "contiguous")])
def test_row_17_stock_breaks_the_contract(offset: float, layout: str) -> None:
    """Row 17: the test above would see a cancellation, as it does in the stock layer."""
    x, dy = (relaid(tensor, layout) for tensor in offset_data(offset))
    layer = scramble(nn.BatchNorm2d(SHAPE[1]))
    expected = expected_of(layer, x, dy)
    assert errors(step(layer, x, dy), expected)["y"] > 10 * CONTRACT


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [1e5, 1e6])
def test_row_17_evaluation_with_mean_far_above_std(offset: float, layout: str) -> None:
    """Row 17: by float32 running statistics too, nothing is lost on the way to the output."""
    layer = scramble(batchnorm.BatchNorm2d(SHAPE[1])).eval()
    layer.running_mean.add_(offset)
    x = relaid(torch.randn(SHAPE) + offset, layout)
    given = {"mean": layer.running_mean.double().numpy(), "var": layer.running_var.double().numpy()}
    weight, bias = (t.detach().double().numpy() for t in (layer.weight, layer.bias))
    expected = torch.from_numpy(reference.forward(x.double().numpy(), weight, bias, **given).y)
    assert float((layer(x).detach() - expected).abs().max() / (1 + expected.abs().max())) <= CONTRACT


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 1e6 / 3, 1e20])
def test_row_17_constant_channels_have_no_variance(value: float, layout: str) -> None:
    """Row 17: the variance of a constant is zero, never negative, and the output is the bias."""
    layer = scramble(batchnorm.BatchNorm2d(3))
    x = relaid(torch.full((5, 3, 7, 9), value), layout)
    count, mean, m2 = functional.moments(x)
    assert torch.all(m2 >= 0)
    assert torch.all(m2 / count <= (1e-15 * abs(value)) ** 2)
    torch.testing.assert_close(mean.float(), torch.full((3,), value), rtol=1e-7, atol=0)
    found = step(layer, x, torch.randn_like(x))
    assert torch.all(layer.running_var >= 0)
    if abs(value) <= 1e6:
        bias = layer.bias.detach().view(1, -1, 1, 1).expand_as(x)
        torch.testing.assert_close(found["y"], bias, rtol=1e-6, atol=1e-6)
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_17_variance_is_never_negative(layout: str) -> None:
    """Row 17: spreads down to a few units in the last place of the mean."""
    for power in range(-8, 2):
        x = relaid(1e4 + torch.randn(64, 4, 3, 3) * 10.0**power, layout)
        _, _, m2 = functional.moments(x)
        expected = x.double().var((0, 2, 3), correction=0) * x.numel() / 4
        assert torch.all(m2 >= 0)
        torch.testing.assert_close(m2, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_row_18_extreme_magnitudes(magnitude: float, layout: str) -> None:
    """Row 18: output and gradients are right where squares and sums leave the range of float32.

    The running variance of 1e60 is beyond float32 itself: it becomes inf there, whoever computes it.
    """
    layer = scramble(batchnorm.BatchNorm2d(8))
    x = relaid((torch.randn(16, 8, 9, 9) + 0.5) * magnitude, layout)
    dy = relaid(torch.randn(16, 8, 9, 9), layout)
    expected = expected_of(layer, x, dy)
    found = step(layer, x, dy)
    assert all(found[name].isfinite().all() for name in ("y", "dx", "dweight", "dbias", "running_mean"))
    overflown = magnitude > 1
    assert torch.all(found["running_var"].isinf()) if overflown else found["running_var"].isfinite().all()
    for tensors in (found, expected):
        tensors["running_mean"] = tensors["running_mean"] / max(1.0, magnitude)
        tensors["running_var"] = torch.zeros(8) if overflown else tensors["running_var"]
    measured = errors(found, expected)
    assert max(measured.values()) <= CONTRACT, measured
    relative = (found["dx"].double() - expected["dx"]).abs().max() / expected["dx"].abs().max()
    assert relative < 1e-5


def test_row_18_stock_fails_at_1e30() -> None:
    """Row 18: the variance overflows in the stock layer, and y is the bias, 0; the test above sees that."""
    y = nn.BatchNorm2d(8)((torch.randn(16, 8, 9, 9) + 0.5) * 1e30)
    assert torch.count_nonzero(y) == 0
