"""Updates of running statistics and their counter: the values, the dtypes, and calls without an update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import functional
from tests.torch.recorded import KINDS
from tests.torch.twins import STATISTICS, assert_identical, assert_same, scramble, state, step, twins

RANKS = {"BatchNorm1d": 2, "BatchNorm2d": 4, "BatchNorm3d": 5}
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


class Wrapper(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Identity(), layer)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.body[1](*tensors)


def statistics(layer: nn.Module) -> dict[str, Tensor]:
    return {name: state(layer)[name] for name in STATISTICS}


def test_row_31_running_variance_is_the_unbiased_one_by_hand() -> None:
    """Row 31: the values 1 and 3 have mean 2, variance 1 (÷ n, normalizes) and 2 (÷ (n - 1), is tracked)."""
    layer = batchnorm.BatchNorm1d(1, eps=1e-12, momentum=0.25)
    y = layer(torch.tensor([[1.0], [3.0]]))
    torch.testing.assert_close(y, torch.tensor([[-1.0], [1.0]]))
    assert layer.running_mean.item() == 0.75 * 0 + 0.25 * 2
    assert layer.running_var.item() == 0.75 * 1 + 0.25 * 2
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_row_19_one_value_per_channel_raises_and_changes_nothing(kind: str) -> None:
    """Row 19: the error names the layer and the remedy; evaluation takes a batch of one."""
    layer = scramble(getattr(batchnorm, kind)(5))
    before = state(layer)
    x = torch.randn(1, 5, *[1] * (RANKS[kind] - 2))
    remedy = r"use a larger batch.*drop_last=True.*\.eval\(\)"
    for model, name in ((layer, kind), (Wrapper(layer), rf"body\.1 \({kind}\)")):
        with pytest.raises(ValueError, match=rf"^{name}: Expected more than 1 value per channel.*{remedy}"):
            model(x)
        assert_identical(state(layer), before)
    assert layer.eval()(x).isfinite().all()
    assert_identical(state(layer), before)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_empty_batch_leaves_statistics_alone_and_counts(momentum: float | None) -> None:
    layer = scramble(batchnorm.BatchNorm2d(5, momentum=momentum))
    before = state(layer)
    for count, shape in enumerate([(0, 5, 4, 4), (3, 5, 0, 4)], start=1):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        y.backward(torch.randn_like(y))
        assert y.shape == x.grad.shape == x.shape
        after = state(layer)
        assert after.pop("num_batches_tracked") == before["num_batches_tracked"] + count
        assert_identical(after, {n: t for n, t in before.items() if n != "num_batches_tracked"})
    assert torch.equal(layer.weight.grad, torch.zeros(5))


def test_no_momentum_is_the_plain_average_over_batches() -> None:
    """Each batch weighs the same, whatever its size, as in the stock layer."""
    stock, ours = (layer.train() for layer in twins("BatchNorm1d", 5, momentum=None, dtype=torch.float64))
    for layer in (stock, ours):
        layer.reset_running_stats()
    batches = [torch.randn(n, 5, dtype=torch.float64) + n for n in (64, 2, 7)]
    for batch in batches:
        stock(batch)
        ours(batch)
    assert_same(statistics(ours), statistics(stock), tolerance=(1e-13, 1e-13))
    mean = torch.stack([batch.mean(0) for batch in batches]).mean(0)
    var = torch.stack([batch.var(0) for batch in batches]).mean(0)
    torch.testing.assert_close(ours.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.running_var, var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_untracked_layers_normalize_by_the_batch_always(training: bool) -> None:
    stock, ours = (
        layer.train(training)
        for layer in twins("BatchNorm1d", 5, track_running_stats=False, dtype=torch.float64)
    )
    x, dy = torch.randn(6, 5, dtype=torch.float64) + 3, torch.randn(6, 5, dtype=torch.float64)
    assert_same(step(ours, x, dy), step(stock, x, dy), tolerance=(1e-12, 1e-12))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ours(x[:1])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_statistics_switched_off_later(training: bool) -> None:
    """Both ways that users know: the flag, and buffers set to None."""
    x = torch.randn(6, 5) + 3
    for name, value in (("track_running_stats", False), ("running_mean", None)):
        stock, ours = (layer.train(training) for layer in twins("BatchNorm1d", 5))
        for layer in (stock, ours):
            setattr(layer, name, value)
            if value is None:
                layer.running_var = None
        torch.testing.assert_close(ours(x), stock(x), rtol=4e-6, atol=4e-6)
        assert_same(state(ours), state(stock), tolerance=(0, 0))


def test_evaluation_moves_nothing() -> None:
    layer = scramble(batchnorm.BatchNorm2d(5)).eval()
    before = state(layer)
    step(layer, torch.randn(4, 5, 3, 3), torch.randn(4, 5, 3, 3))
    assert_identical(state(layer), before)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inference_mode(training: bool) -> None:
    stock, ours = (layer.train(training) for layer in twins("BatchNorm1d", 5))
    x = torch.randn(6, 5) + 3
    with torch.inference_mode():
        y, expected = ours(x), stock(x)
    assert y.is_inference()
    torch.testing.assert_close(y.clone(), expected.clone(), rtol=4e-6, atol=4e-6)
    assert_same(state(ours), state(stock), tolerance=(4e-6, 4e-6))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_row_9_two_forwards_then_one_backward(training: bool, activation: str | None) -> None:
    """Row 9, in one process: running statistics may move, by us or by hand, between forward and backward."""
    layer = scramble(batchnorm.BatchNorm1d(5, dtype=torch.float64, activation=activation)).train(training)
    real, fake, dy = (torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    alone = []
    start = state(layer)
    for x in (real, fake):
        layer.load_state_dict(start)
        alone.append(step(layer, x, dy)["dx"])
    layer.load_state_dict(start)
    leaves = [x.clone().requires_grad_() for x in (real, fake)]
    first, second = (layer(leaf) for leaf in leaves)
    layer.running_mean.add_(100)
    layer.running_var.mul_(100)
    (first * dy).sum().add((second * dy).sum()).backward()
    for leaf, expected in zip(leaves, alone, strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-12)


def half_layers(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return 16-bit layers by every way that leads to one."""
    moved = batchnorm.BatchNorm1d(5).to(dtype)
    model = nn.Sequential(nn.Linear(5, 5), batchnorm.BatchNorm1d(5))
    named = {torch.bfloat16: model.bfloat16, torch.float16: model.half}[dtype]()[1]
    constructed = batchnorm.BatchNorm1d(5, dtype=dtype)
    loaded, assigned = batchnorm.BatchNorm1d(5, dtype=dtype), batchnorm.BatchNorm1d(5)
    checkpoint = nn.BatchNorm1d(5, dtype=dtype).state_dict()
    loaded.load_state_dict(checkpoint)
    assigned.load_state_dict(checkpoint, assign=True)
    return {
        "to": moved,
        "method": named,
        "constructed": constructed,
        "loaded": loaded,
        "assigned": assigned,
    }


@HALVES
@pytest.mark.parametrize("way", ["to", "method", "constructed", "loaded", "assigned"])
def test_row_32_statistics_stay_float32_in_16_bit_layers(way: str, dtype: torch.dtype) -> None:
    """Row 32: whichever way a layer became 16-bit, it tracks in float32, as accurately as before."""
    layer = half_layers(dtype)[way]
    assert layer.weight.dtype is layer.bias.dtype is dtype
    batches = [(torch.randn(16, 5) + 3).to(dtype) for _ in range(30)]
    wide = nn.BatchNorm1d(5, dtype=torch.float64)
    for batch in batches:
        y = layer(batch)
        wide(batch.double())
    assert layer.running_mean.dtype is layer.running_var.dtype is torch.float32
    assert y.dtype is dtype
    torch.testing.assert_close(layer.running_mean, wide.running_mean.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var, wide.running_var.float(), rtol=1e-6, atol=1e-6)


@HALVES
def test_row_32_statistics_are_not_rounded_on_the_way(dtype: torch.dtype) -> None:
    """Row 32: `.half()` and back gives the running statistics that were there, bit for bit."""
    layer = scramble(batchnorm.BatchNorm1d(5))
    before = statistics(layer)
    assert_identical(statistics(layer.to(dtype)), before)
    assert_identical(statistics(layer.float()), before)


def test_row_32_other_conversions_are_the_stock_ones() -> None:
    """Row 32: float64, `.to("meta")` and `requires_grad_` do what they do to every layer."""
    stock, ours = twins("BatchNorm1d", 5)
    for convert in (
        nn.Module.double,
        nn.Module.float,
        lambda layer: layer.to(torch.float64),
        lambda layer: layer.to("meta"),
    ):
        stock, ours = convert(stock), convert(ours)
        assert [(n, t.dtype, t.device) for n, t in ours.state_dict().items()] == [
            (n, t.dtype, t.device) for n, t in stock.state_dict().items()
        ]


@HALVES
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_row_32_16_bit_layers_are_float64_ones_rounded_once(training: bool, dtype: torch.dtype) -> None:
    """Row 32: output and gradients of a 16-bit layer lose nothing but their own last rounding."""
    layer = scramble(batchnorm.BatchNorm2d(5)).to(dtype).train(training)
    x, dy = ((torch.randn(4, 5, 3, 3) + 1).to(dtype) for _ in range(2))
    wide = nn.BatchNorm2d(5, dtype=torch.float64).train(training)
    wide.load_state_dict(layer.state_dict())
    found: dict[str, Any] = step(layer, x, dy)
    for name, expected in step(wide, x.double(), dy.double()).items():
        actual = found[name]
        rtol = torch.finfo(dtype).eps if actual.dtype is dtype else 1e-6
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=rtol, atol=1e-6, msg=name)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_functional_form_moves_the_same_statistics(momentum: float | None) -> None:
    """`pure_batch_norm` returns what `batch_norm` writes, and writes to nothing."""
    layer = scramble(batchnorm.BatchNorm1d(5, momentum=momentum))
    x, before = torch.randn(6, 5), state(layer)
    share = 0.1 if momentum is None else momentum
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    y, new_mean, new_var = functional.pure_batch_norm(x, mean, var, training=True, momentum=share)
    assert torch.equal(mean, before["running_mean"])
    assert torch.equal(var, before["running_var"])
    expected = functional.batch_norm(x, mean, var, training=True, momentum=share)
    assert torch.equal(y, expected)
    assert torch.equal(new_mean, mean)
    assert torch.equal(new_var, var)
    assert not torch.equal(new_mean, before["running_mean"])
