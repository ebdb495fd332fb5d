"""One bit per value in place of the residual: where an engine keeps that, behind relu and relu6."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import batchnorm
from batchnorm.kernels import use
from batchnorm.kernels.choose import load
from tests.support.interpreted import DEVICE, HAS_TRITON, every_combination
from tests.torch.lean_nets import Residual, gradients
from tests.torch.twins import assert_identical, assert_same, relaid, scramble

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def tensors(layout: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [relaid(torch.randn(5, 6, 4, 5, dtype=dtype), layout).to(DEVICE) for _ in range(3)]


def norm(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    layer = scramble(batchnorm.BatchNorm2d(6, **options)).to(DEVICE)
    return layer.double() if dtype == torch.float64 else layer


def gradients_of(
    layer: nn.Module, x: Tensor, residual: Tensor, dy: Tensor, **options: Any
) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, residual)]
    wanted = [*leaves, layer.weight, layer.bias]
    y = layer(*leaves, **options)
    found = torch.autograd.grad(y, wanted, dy)
    return dict(zip(("y", "dx", "dresidual", "dweight", "dbias"), (y.detach(), *found), strict=True))


@pytest.mark.one_in(2)
@every_combination(
    "statistics, dtype, activation, layout",
    [batchnorm.Batch(), batchnorm.Ghost(2), batchnorm.Running()],
    [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    ["relu", "relu6"],
    ["contiguous", "channels_last", "strided"],
)
def test_gradients_are_those_by_the_residual(
    monkeypatch: pytest.MonkeyPatch, statistics: Any, dtype: torch.dtype, activation: str, layout: str
) -> None:
    """Bit for bit: the same slopes, whether they are kept or found again."""
    given = tensors(layout, dtype)
    mask = torch.rand(5, 4, 5, device=DEVICE) > 0.3
    for options in ({}, {"mask": mask}):
        found = []
        for keeps in (True, False):
            with monkeypatch.context() as patch, use("gpu"):
                if not keeps:
                    patch.setattr(load("gpu"), "activation_mask", lambda *_: None)
                layer = norm(dtype, activation=activation, statistics=statistics)
                found.append(gradients_of(layer, *given, **options))
        assert_identical(*found)
        dresidual = found[0]["dresidual"]
        assert 0 < (dresidual == 0).sum() < dresidual.numel()


def kept_by(activation: str | None, engine: str) -> list[tuple[torch.dtype, int]]:
    """Return dtype and number of values of each tensor of x's size, or of bits, that a norm keeps."""
    x, residual, _ = tensors("contiguous")
    kept: list[tuple[torch.dtype, int]] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8 or tensor.shape == x.shape:
            kept.append((tensor.dtype, tensor.numel()))
        return tensor

    with use(engine), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        norm(activation=activation)(x.requires_grad_(), residual)
    return kept


def test_row_23_a_bit_per_value_is_kept_and_no_residual() -> None:
    """Row 23: x, and a 32nd of what the residual takes."""
    x = torch.float32, 5 * 6 * 4 * 5
    assert kept_by("relu", "gpu") == [x, (torch.uint8, 6 * 8 * 32 // 8)]
    assert kept_by("silu", "gpu") == [x, x]
    assert kept_by(None, "gpu") == [x]
    assert kept_by("relu", "eager") == [x, x]


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_a_second_derivative_finds_the_slopes_too(activation: str) -> None:
    x, residual, dy = tensors("contiguous", torch.float64)
    results = []
    for engine in ("gpu", "eager"):
        leaves = [t.detach().clone().requires_grad_() for t in (x, residual, dy)]
        layer = norm(torch.float64, activation=activation)
        with use(engine):
            y = layer(*leaves[:2])
            first = torch.autograd.grad(y, [*leaves[:2], layer.weight], leaves[2], create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), [leaves[0], leaves[2]])
        results.append(dict(enumerate([*(g.detach() for g in first), *second])))
    assert_same(*results, (1e-10, 1e-10))


def test_a_batch_of_cotangents_finds_the_slopes_too() -> None:
    x, residual, dy = tensors("contiguous")
    batch = torch.stack([dy, 2 * dy])
    results = []
    for engine in ("gpu", "eager"):
        leaves = [t.detach().clone().requires_grad_() for t in (x, residual)]
        with use(engine):
            y = norm(activation="relu")(*leaves)
            found = torch.autograd.grad(y, leaves, batch, is_grads_batched=True)
        results.append(dict(enumerate(found)))
    assert_same(*results, (4e-6, 8e-6))


def test_row_23_lean_keeps_no_residual_that_nobody_else_keeps() -> None:
    """Row 23: such an output is kept as it is, and not its residual for it."""
    x, residual, dy = (t.requires_grad_() for t in tensors("contiguous"))
    layer = norm(activation="relu")
    with use("gpu"), batchnorm.lean():
        added = residual * 2
        there = StorageWeakRef(added.untyped_storage())
        loss = (layer(x, added).sin() * dy).sum()
        del added
    gc.collect()  # Triton's interpreter leaves cycles that hold arguments
    assert there.expired()
    loss.backward()
    assert residual.grad is not None


def test_row_23_lean_recomputes_outputs_whose_residual_is_not_kept_by_the_norm() -> None:
    """Row 23: a chain of residual blocks under `lean`: the same gradients, bit for bit."""
    net = nn.Sequential(*(Residual(4, (4, 4)) for _ in range(3))).to(DEVICE)
    x = torch.randn(2, 4, 4, 4, device=DEVICE)
    with use("gpu"):
        assert_identical(gradients(net, x, batchnorm.lean, steps=1), gradients(net, x, steps=1))
