"""Row 21: ghost batches are what a loop over parts of the batch computes, in one call, in training only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import InputShapeError
from batchnorm.kernels import choose
from tests.torch.twins import assert_identical, scramble, state, step, twins

SIZES = [(12, 4), (12, 5), (7, 3), (5, 64), (9, 1)]
SHAPE = (6, 4, 3)  # channels and positions


def looped(stock: nn.Module, x: Tensor, dy: Tensor, size: int) -> dict[str, Tensor]:
    """Return what the stock layer gives, called on one part after the other."""
    leaf = x.clone().requires_grad_()
    y = torch.cat([stock(part) for part in leaf.split(size)])
    y.backward(dy)
    found = {"y": y.detach(), "dx": leaf.grad, "dweight": stock.weight.grad, "dbias": stock.bias.grad}
    return found | state(stock)


@pytest.mark.parametrize(("samples", "size"), SIZES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_row_21_ghost_batches_are_a_loop_over_parts(
    samples: int, size: int, layout: str, momentum: float | None
) -> None:
    """Row 21: any size, ragged tails too; running statistics those of the whole batch, or the loop's."""
    stock, layer = twins("BatchNorm2d", SHAPE[0], momentum=momentum, dtype=torch.float64)
    x, dy = (torch.randn(samples, *SHAPE, dtype=torch.float64) + 1 for _ in range(2))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    whole, start = copy.deepcopy(stock), state(layer)
    whole(x)
    parts = looped(stock, x, dy, size)
    for sequential in (False, True):
        layer.load_state_dict(start)
        layer.statistics = batchnorm.Ghost(size, sequential=sequential)
        found = step(layer, x, dy)
        expected = parts if sequential else parts | state(whole)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=f"{name} {sequential}")


def test_row_21_evaluation_is_the_stock_layers() -> None:
    """Row 21: no ghost batches there: the output of a sample does not depend on the others."""
    stock, layer = twins("BatchNorm2d", SHAPE[0])
    layer.statistics = batchnorm.Ghost(2)
    x, before = torch.randn(7, *SHAPE), state(layer)
    torch.testing.assert_close(layer.eval()(x), stock.eval()(x))
    assert torch.equal(layer(x)[:1], layer(x[:1]))
    assert_identical(state(layer), before)


def test_row_21_all_groups_are_one_call_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 21: no loop: a kernel takes all ghost batches at once."""
    calls: list[str] = []

    class Spy:
        def __getattr__(self, primitive: str) -> object:
            calls.append(primitive)
            return getattr(choose.load("cpu"), primitive)

    monkeypatch.setitem(choose.ENGINES, "spy", Spy())
    layer = batchnorm.BatchNorm2d(SHAPE[0], statistics=batchnorm.Ghost(2))
    with batchnorm.kernels.use("spy"):
        y = layer(torch.randn(32, *SHAPE, requires_grad=True))
        y.backward(torch.randn_like(y))
    assert [name for name in calls if name in ("forward", "moments", "normalize", "backward")] == [
        "forward",
        "backward",
    ]


def test_row_19_and_21_a_tail_of_one_value() -> None:
    """Rows 19 and 21: refused by name, with the remedies; or normalized by the running statistics."""
    x, dy = torch.randn(7, 5), torch.randn(7, 5)
    layer = scramble(batchnorm.BatchNorm1d(5, statistics=batchnorm.Ghost(3)))
    before = state(layer)
    with pytest.raises(
        InputShapeError, match=r"^BatchNorm1d: .*ghost batches of 3.*drop_last=True.*small_batch"
    ):
        layer(x)
    assert_identical(state(layer), before)
    layer.small_batch = "running"
    found = step(layer, x, dy)
    alone = step(scramble_as(layer, before).eval(), x[6:], dy[6:])
    for name in ("y", "dx"):
        torch.testing.assert_close(found[name][6:], alone[name])
    whole = scramble_as(batchnorm.BatchNorm1d(5), before)
    whole(x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(found[name], getattr(whole, name))


def scramble_as(layer: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Return a copy of the layer in another state."""
    twin = copy.deepcopy(layer)
    twin.load_state_dict(tensors)
    return twin
