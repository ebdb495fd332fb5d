"""A stock layer and ours with the same state, what one step of each gives, and the comparison of the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# dtype -> (relative, absolute). float32: both sides round, each within 2e-6 on data near 1. float64: a sum
# of a few hundred values in another order.
TOLERANCES = {torch.float32: (4e-6, 4e-6), torch.float64: (1e-12, 1e-12)}


def twins(kind: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Return `torch.nn.<kind>(*args)` and `batchnorm.<kind>(*args)` in one scrambled state."""
    stock = scramble(getattr(nn, kind)(*args, **kwargs))
    ours = getattr(batchnorm, kind)(*args, **kwargs)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def scramble(layer: nn.Module) -> nn.Module:
    """Give a layer parameters away from 1 and 0, running statistics of some past, and a count of three."""
    with torch.no_grad():
        if layer.weight is not None:
            layer.weight.uniform_(0.5, 1.5)
        if layer.bias is not None:
            layer.bias.normal_()
        if layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.num_batches_tracked.fill_(3)
    return layer


def relaid(x: Tensor, layout: str) -> Tensor:
    """Return the same values in another memory layout."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return x.new_zeros(*x.shape, 2).copy_(x.unsqueeze(-1)).select(-1, 0)
    if layout == "batch_last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    assert layout == "contiguous"
    return x.contiguous()


def step(
    layer: nn.Module, x: Tensor, dy: Tensor, *residual: Tensor, **masks: Tensor | None
) -> dict[str, Tensor | None]:
    """Return output, gradients and statistics of one forward and backward, the cotangent being `dy`."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *residual)]
    layer.zero_grad()
    y = layer(*leaves, **masks)
    y.backward(dy)
    found = {"y": y.detach(), "dx": leaves[0].grad, "dweight": None, "dbias": None}
    if residual:
        found["dresidual"] = leaves[1].grad
    found |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return found | state(layer)


def state(layer: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def assert_same(
    ours: Mapping[str, Tensor | None], stock: Mapping[str, Tensor | None], tolerance: tuple[float, float]
) -> None:
    """Raise unless both have the same names, dtypes and shapes, and values within (relative, absolute)."""
    assert list(ours) == list(stock)
    for name, expected in stock.items():
        actual = ours[name]
        if expected is None or actual is None:
            assert actual is expected, f"{name}: {actual} is not {expected}"
            continue
        rtol, atol = tolerance
        torch.testing.assert_close(
            actual,
            expected,
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_identical(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """Raise unless the two states are equal bit for bit."""
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
