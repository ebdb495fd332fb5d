"""Row 21: ghost batches are what a loop over parts of the batch computes, in one call, in training only."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.errors import InputShapeError
from batchnorm.kernels import choose
from batchnorm.statistics.policy_config import from_config, from_text
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


SHUFFLED = batchnorm.Ghost(4, shuffle=True)


def _in_order_of(seed: int, samples: int) -> Tensor:
    """Return the order that a layer draws after this seed."""
    torch.manual_seed(seed)
    return torch.randperm(samples)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sequential", [False, True])
def test_row_42_shuffled_ghost_batches_are_those_of_a_permuted_batch(
    layout: str, masked: bool, sequential: bool
) -> None:
    """Row 42: drawn by torch's generator; output, gradients and residual in the order of the input."""
    torch.manual_seed(3)
    x, dy, residual = (torch.randn(11, *SHAPE, dtype=torch.float64) + 1 for _ in range(3))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    mask = torch.rand(11, *SHAPE[1:]) < 0.7 if masked else None
    layer = scramble(batchnorm.BatchNorm2d(SHAPE[0], activation="silu", dtype=torch.float64))
    twin = copy.deepcopy(layer)
    layer.statistics = batchnorm.Ghost(4, sequential, shuffle=True)
    twin.statistics = batchnorm.Ghost(4, sequential)
    order = _in_order_of(5, 11)
    leaves = [t.clone().requires_grad_() for t in (x, residual, x, residual)]
    torch.manual_seed(5)
    y = layer(*leaves[:2], mask)
    expected = twin(leaves[2][order], leaves[3][order], None if mask is None else mask[order])
    y.backward(dy)
    expected.backward(dy[order])
    assert y.stride() == x.stride()
    torch.testing.assert_close(y[order], expected, rtol=1e-12, atol=1e-12)
    for own, other in zip((*leaves[:2], *layer.parameters()), (*leaves[2:], *twin.parameters()), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-11, atol=1e-11)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)
    assert not torch.equal(layer(x), layer(x))  # each call draws anew
    assert torch.equal(layer.eval()(x), layer(x))


def _second_order(layer: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(leaf), leaf, dy, create_graph=True)
    return torch.autograd.grad(dx.sin().sum(), leaf)[0]


def test_row_42_shuffled_on_every_path() -> None:
    """Row 42: compiled, functional, double backward, recomputed by a checkpoint, under torch.func."""
    layer = scramble(batchnorm.BatchNorm1d(6, statistics=SHUFFLED, dtype=torch.float64))
    start = state(layer)
    x, dy = (torch.randn(10, 6, dtype=torch.float64) for _ in range(2))
    order = _in_order_of(2, 10)

    def again(call: Callable[..., Tensor], *others: Tensor) -> Tensor:
        layer.load_state_dict(start)
        torch.manual_seed(2)
        return call(*others)

    expected = again(layer, x)
    torch.testing.assert_close(again(torch.compile(layer, fullgraph=True, backend="aot_eager"), x), expected)
    twin = copy.deepcopy(layer)
    twin.statistics = batchnorm.Ghost(4)
    found = again(lambda: _second_order(layer, x, dy))
    torch.testing.assert_close(found[order], _second_order(twin, x[order], dy[order]), rtol=1e-9, atol=1e-9)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    again(layer, leaves[0]).backward(dy)
    for reentrant in (False, True):
        leaves[1].grad = None
        again(lambda: checkpoint(layer, leaves[1], use_reentrant=reentrant)).backward(dy)  # noqa: B023
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)

    def pure(x: Tensor) -> Tensor:
        return batchnorm.functional.batch_norm(
            x, None, None, layer.weight, layer.bias, True, statistics=SHUFFLED
        )

    torch.testing.assert_close(again(pure, x), expected)
    tangent = again(lambda: torch.func.jvp(pure, (x,), (dy,))[1])
    back = again(lambda: torch.func.vjp(pure, x)[1](dy)[0])
    torch.testing.assert_close((tangent * dy).sum(), (dy * back).sum())


def test_row_42_a_shuffled_policy_travels() -> None:
    """Row 42: as plain data and text, over ranks, and to Keras's settings."""
    for policy in (SHUFFLED, batchnorm.Synced(over=SHUFFLED)):
        assert from_text(policy.text) == policy
        assert policy.is_shuffled
        assert not policy.in_order().is_shuffled
        assert not from_config(SHUFFLED.config() | {"shuffle": False}).is_shuffled
    old = {"policy": "Ghost", "size": 4, "sequential": False}  # as stored before there was `shuffle`
    assert from_config(old) == batchnorm.Ghost(4)
    layer = batchnorm.BatchNorm1d(3, statistics=SHUFFLED)
    assert copy.deepcopy(layer).statistics == SHUFFLED
    assert batchnorm.conventions.torch_to_keras(layer)[0]["statistics"] == SHUFFLED


def test_row_42_shuffled_over_ranks_alone_is_shuffled_here() -> None:
    layer, synced = (batchnorm.BatchNorm1d(5, statistics=SHUFFLED) for _ in range(2))
    synced.statistics = batchnorm.Synced(over=SHUFFLED)
    x = torch.randn(10, 5)
    found = []
    for norm in (layer, synced):
        torch.manual_seed(0)
        found.append(norm(x))
    torch.testing.assert_close(*found)
