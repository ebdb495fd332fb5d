"""What torch's recorded samples do not show of the layers: signature, kind, fusion, autocast, memory."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.kernels.activations import ACTIVATIONS
from tests.torch.recorded import KINDS
from tests.torch.twins import assert_same, scramble, state, step, twins

SHAPES = {"BatchNorm1d": (6, 5, 4), "BatchNorm2d": (6, 5, 4, 3), "BatchNorm3d": (6, 5, 2, 3, 4)}
MODULES: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "hardswish": nn.Hardswish(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "elu": nn.ELU(),
}


class Composed(nn.Module):
    """The stock layer, an addition and the stock activation, one after the other."""

    def __init__(self, norm: nn.Module, activation: nn.Module | None) -> None:
        super().__init__()
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        y = y if residual is None else y + residual
        return y if self.activation is None else self.activation(y)


@pytest.mark.parametrize("kind", KINDS)
def test_signature_is_the_stock_one_and_ours_keyword_only(kind: str) -> None:
    def described(parameters: list[inspect.Parameter]) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.default, p.kind) for p in parameters]

    stock = list(inspect.signature(getattr(nn, kind)).parameters.values())
    ours = list(inspect.signature(getattr(batchnorm, kind)).parameters.values())
    positional = [p for p in stock if p.kind is not p.KEYWORD_ONLY]
    assert described(ours[: len(positional)]) == described(positional)
    rest = {p.name: p for p in ours[len(positional) :]}
    assert all(p.kind is p.KEYWORD_ONLY for p in rest.values())
    assert {name: p.default for name, p in rest.items()} == {
        "bias": True,
        "statistics": batchnorm.Batch(),
        "activation": None,
        "nonfinite": "propagate",
        "small_batch": "raise",
        "domains": 1,
        "domain_affine": False,
        "warm_start": False,
    }


def test_function_signatures_begin_with_the_stock_one() -> None:
    stock = list(inspect.signature(torch.nn.functional.batch_norm).parameters.values())
    for function in (batchnorm.functional.batch_norm, batchnorm.functional.pure_batch_norm):
        ours = list(inspect.signature(function).parameters.values())
        same = [(p.name, p.default, p.kind) for p in ours[: len(stock)]]
        assert same == [(p.name, p.default, p.kind) for p in stock]
        assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(stock) :])


@pytest.mark.parametrize("kind", KINDS)
def test_is_a_stock_layer(kind: str) -> None:
    layer = getattr(batchnorm, kind)(4)
    assert isinstance(layer, getattr(nn, kind))
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert type(layer).__name__ == kind
    others = [getattr(nn, other) for other in KINDS if other != kind]
    assert not isinstance(layer, tuple(others))


@pytest.mark.parametrize("kind", KINDS)
def test_bias_is_keyword_only_on_every_torch(kind: str) -> None:
    layer = getattr(batchnorm, kind)(4, bias=False)
    assert layer.bias is None
    assert list(layer.state_dict()) == ["weight", "running_mean", "running_var", "num_batches_tracked"]
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(4))


def test_repr_tells_the_activation() -> None:
    assert repr(batchnorm.BatchNorm2d(3, activation="relu")).endswith(", activation=relu)")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
def test_fused_is_the_composition_of_stock_layers(
    activation: str | None, with_residual: bool, training: bool, kind: str
) -> None:
    stock, _ = twins(kind, 5, dtype=torch.float64)
    ours = getattr(batchnorm, kind)(5, dtype=torch.float64, activation=activation)
    ours.load_state_dict(stock.state_dict())
    composed = Composed(stock, None if activation is None else MODULES[activation])
    tensors = [2 * torch.randn(SHAPES[kind], dtype=torch.float64) + 1 for _ in range(2 + with_residual)]
    found = step(ours.train(training), *tensors)
    expected = step(composed.train(training), *tensors)
    expected = {name.replace("norm.", ""): tensor for name, tensor in expected.items()}
    assert_same(found, {name: expected[name] for name in found}, tolerance=(1e-12, 1e-12))


@pytest.mark.parametrize("activation", ["silu", None])
def test_residual_of_another_dtype_promotes_as_addition_does(activation: str | None) -> None:
    composed = Composed(nn.BatchNorm1d(5), None if activation is None else MODULES[activation])
    ours = batchnorm.BatchNorm1d(5, activation=activation)
    for x_dtype, residual_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        x = torch.randn(6, 5).to(x_dtype).requires_grad_()
        residual = torch.randn(6, 5).to(residual_dtype).requires_grad_()
        y, expected = ours(x, residual), composed(x, residual)
        assert y.dtype is expected.dtype is torch.float32
        # Stock rounds the norm to bfloat16 before the addition, ours does not: 2^-8 of |norm| <= 4.
        torch.testing.assert_close(y, expected, rtol=0, atol=2**-6)
        y.backward(torch.randn_like(y))
        assert (x.grad.dtype, residual.grad.dtype) == (x_dtype, residual_dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast_with_a_convolution_before_and_a_float32_residual(training: bool) -> None:
    convolution = nn.Conv2d(3, 5, 3, padding=1)
    stock, ours = (layer.train(training) for layer in twins("BatchNorm2d", 5))
    x, residual = torch.randn(4, 3, 6, 6), torch.randn(4, 5, 6, 6)
    found = []
    for layer in (ours, stock):
        convolution.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = convolution(x)
            assert hidden.dtype is torch.bfloat16
            plain = layer(hidden)
            y = layer(hidden, residual) if layer is ours else layer(hidden) + residual
        (y.square().sum() + plain.float().square().sum()).backward()
        grads = {"dconv": convolution.weight.grad.clone(), "dweight": layer.weight.grad}
        found.append({"plain": plain.detach(), "y": y.detach(), **grads, **state(layer)})
    scale = float(found[1]["dconv"].abs().max())
    # Stock rounds its output to bfloat16 before it adds the residual; ours does not round there.
    assert_same(*found, tolerance=(2e-2, 2e-2 * scale))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {3}, {0, 3}, {1, 2}, {0, 1, 2, 3}, set()], ids=str)
@pytest.mark.parametrize("activation", ["silu", None])
def test_only_what_requires_a_gradient_gets_one(
    activation: str | None, wanted: set[int], training: bool
) -> None:
    stock, _ = twins("BatchNorm1d", 5, dtype=torch.float64)
    ours = batchnorm.BatchNorm1d(5, dtype=torch.float64, activation=activation)
    ours.load_state_dict(stock.state_dict())
    x, residual, dy = (torch.randn(7, 5, dtype=torch.float64) for _ in range(3))
    found = []
    for layer in (ours, Composed(stock, None if activation is None else MODULES[activation])):
        layer.train(training)
        leaves = [x.clone(), *layer.parameters(), residual.clone()]
        for place, leaf in enumerate(leaves):
            leaf.requires_grad_(place in wanted)
        y = layer(leaves[0], leaves[3])
        assert y.requires_grad == bool(wanted)
        if wanted:
            y.backward(dy)
        found.append({str(place): leaf.grad for place, leaf in enumerate(leaves)})
    assert {place for place, grad in found[0].items() if grad is not None} == {str(w) for w in wanted}
    assert_same(*found, tolerance=(1e-12, 1e-12))


def test_frozen_affine_parameters_still_let_gradients_through() -> None:
    stock, ours = twins("BatchNorm2d", 5, dtype=torch.float64)
    for layer in (stock, ours):
        layer.requires_grad_(False)
    x, dy = (torch.randn(4, 5, 3, 3, dtype=torch.float64) for _ in range(2))
    found = step(ours, x, dy)
    assert found["dweight"] is None
    assert_same(found, step(stock, x, dy), tolerance=(1e-12, 1e-12))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
def test_memory_kept_for_the_backward(with_residual: bool, activation: str | None, training: bool) -> None:
    """Of the input's size, only x is kept, and the residual where an activation's derivative needs it."""
    layer = scramble(batchnorm.BatchNorm2d(5, activation=activation)).train(training)
    x = torch.randn(4, 5, 6, 6, requires_grad=True)
    residual = [torch.randn(4, 5, 6, 6, requires_grad=True)] if with_residual else []
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x, *residual)
    large = {t.data_ptr() for t in kept if t.numel() >= x.numel()}
    expected = [x, *residual] if activation is not None else [x]
    assert large == {t.data_ptr() for t in expected}
    small = sum(t.numel() * t.element_size() for t in kept if t.numel() < x.numel())
    assert small <= 8 * (1 + 3 * 5) + 2 * 4 * 5  # count, mean, m2 and rstd in one table; weight and bias
    assert y.data_ptr() not in large


def test_stock_layout_in_memory() -> None:
    stock, ours = twins("BatchNorm2d", 5)
    x = torch.randn(4, 5, 6, 7).to(memory_format=torch.channels_last).requires_grad_()
    y, expected = ours(x), stock(x)
    assert y.stride() == expected.stride()
    y.backward(torch.randn_like(y))
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


class Tagged(Tensor):
    """A tensor subclass that changes nothing."""


def test_tensor_subclasses_pass_through() -> None:
    x = torch.randn(6, 5)
    layer = scramble(batchnorm.BatchNorm1d(5)).eval()
    y = layer(x.as_subclass(Tagged))
    assert type(y) is Tagged
    with batchnorm.kernels.use("eager"):  # no other engine reads the memory of what is no plain tensor
        assert torch.equal(y.as_subclass(Tensor), layer(x))


def test_autograd_notices_that_running_statistics_have_moved() -> None:
    """The kernel that moves them writes past torch, which must know all the same."""
    layer = batchnorm.BatchNorm1d(3)
    factor = torch.ones(3, requires_grad=True)
    product = (factor * layer.running_mean).sum()
    layer(torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
