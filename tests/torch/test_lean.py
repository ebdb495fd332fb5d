"""Rows 23 and 24: `lean` keeps no outputs of norms, with any activation, and changes no bit of a gradient."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

import batchnorm
from batchnorm.kernels import use
from batchnorm.torch.output_recompute import SEGMENT
from tests.support.cases import ACTIVATIONS
from tests.torch.lean_nets import NETS, Residual, Watch, conv, gradients, norm, small_net
from tests.torch.twins import assert_identical, relaid, scramble, state

KINDS = {
    2: batchnorm.BatchNorm1d,
    3: batchnorm.BatchNorm1d,
    4: batchnorm.BatchNorm2d,
    5: batchnorm.BatchNorm3d,
}


def one_layer(
    layer: nn.Module,
    x: Tensor,
    residual: Tensor | None,
    cotangent: Tensor,
    around: AbstractContextManager[object],
) -> tuple[dict[str, Tensor], bool]:
    """Return gradients and state of a layer, in front of one that keeps its input; whether that was kept."""
    leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    layer.zero_grad()
    with around:
        y = layer(*(leaf * 1 for leaf in leaves))
        kept = StorageWeakRef(y.untyped_storage())
        loss = (y.sin() * cotangent).sum()
    del y
    was_kept = not kept.expired()
    loss.backward()
    found = {f"d{number}": leaf.grad for number, leaf in enumerate(leaves)}
    found |= {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return found | state(layer), was_kept


@pytest.mark.one_in(3)
@pytest.mark.parametrize("engine", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_row_23_and_24_a_layer_in_every_layout(
    activation: str | None, dtype: torch.dtype, engine: str
) -> None:
    """Row 24: with any activation, exactly; in training and with given statistics, residual or none."""
    for shape in ((6, 5), (4, 5, 7), (3, 20, 9, 8), (2, 3, 4, 5, 6)):
        real = torch.float64 if dtype == torch.float64 else torch.float32
        layer = scramble(KINDS[len(shape)](shape[1], activation=activation, dtype=real))
        start = state(layer)
        for layout in ("contiguous", "channels_last", "strided"):
            x, residual, cotangent = (relaid(torch.randn(shape, dtype=dtype) + 1, layout) for _ in range(3))
            for added, training in ((None, True), (residual, True), (residual, False)):
                found = []
                for around in (contextlib.nullcontext(), batchnorm.lean()):
                    layer.load_state_dict(start)
                    with use(engine):
                        found.append(one_layer(layer.train(training), x, added, cotangent, around))
                (plain, was_kept), (lean, is_kept) = found
                assert_identical(lean, plain)
                assert was_kept
                # Without an activation, nobody keeps the residual: keeping the output instead is no loss.
                assert is_kept == (activation is None and added is not None)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_row_23_a_large_layer(layout: str) -> None:
    layer, start = norm(16), None
    x, residual, cotangent = (relaid(torch.randn(4, 16, 160, 160), layout) for _ in range(3))
    start = state(layer)
    plain, _ = one_layer(layer, x, residual, cotangent, contextlib.nullcontext())
    layer.load_state_dict(start)
    lean, is_kept = one_layer(layer, x, residual, cotangent, batchnorm.lean())
    assert_identical(lean, plain)
    assert not is_kept


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NETS)
def test_row_23_networks(name: str, layout: str, training: bool) -> None:
    """Row 23: gradients, parameters and running statistics over two steps, bit for bit; norms frozen, too."""
    torch.manual_seed(1)
    model = NETS[name]().to(memory_format=getattr(torch, f"{layout}_format".replace("last_format", "last")))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(training)
    x = relaid(torch.randn(3, 3, 12, 12), layout)
    assert_identical(gradients(model, x, batchnorm.lean), gradients(model, x))


def test_row_23_a_network_keeps_no_outputs_of_norms() -> None:
    """Row 23: after the forward they are gone; after the backward, so is all else."""
    model = small_net(depth=3)
    watch = Watch(model)
    x = torch.randn(2, 4, 6, 6)
    loss = model(x).square().sum()
    assert watch.alive() == (3, 3)
    del loss
    assert watch.alive() == (0, 0)
    with batchnorm.lean():
        loss = model(x).square().sum()
    assert watch.alive() == (3, 0)
    loss.backward()
    assert watch.alive() == (0, 0)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("activation", ["relu", None], ids=str)
@pytest.mark.parametrize("depth", [3, 11])
def test_row_23_a_chain_of_residuals(
    depth: int, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 23: one output in `SEGMENT + 1` is kept, and each other one is recomputed once per backward."""
    model = nn.Sequential(conv(4, 4), norm(4), *(Residual(4, (4, 4), activation) for _ in range(depth - 1)))
    watch = Watch(model)
    x = torch.randn(2, 4, 6, 6)
    with batchnorm.lean():
        y = model(x)
        loss = y.sin().sum()
    del y
    anchors = depth // (SEGMENT + 1)
    assert watch.alive() == (2 * depth - 1, anchors)
    from batchnorm.kernels.cpu import engine

    calls, normalize = [], engine.normalize
    monkeypatch.setattr(engine, "normalize", lambda *a, **k: calls.append(1) or normalize(*a, **k))
    for number in (1, 2):
        loss.backward(retain_graph=True)
        assert len(calls) == number * (2 * depth - 1 - anchors)
        assert watch.alive() == (2 * depth - 1, anchors)


def test_row_23_several_readers_share_one_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 23: and it is released behind the last of them, in a backward that does not reach the norm, too."""
    from batchnorm.kernels.cpu import engine

    layer, convs = norm(4), nn.ModuleList(conv(4, 4, size) for size in (1, 3, 5))
    with batchnorm.lean():
        y = layer(torch.randn(2, 4, 6, 6, requires_grad=True) * 1)
        whole = sum(c(y).sin().sum() for c in convs) + y[:, 1:3].square().sum()
    del y
    recomputed, normalize = [], engine.normalize

    def seen(*arguments: Any, **options: Any) -> Tensor:
        found = normalize(*arguments, **options)
        recomputed.append(StorageWeakRef(found.untyped_storage()))
        return found

    monkeypatch.setattr(engine, "normalize", seen)
    whole.backward(retain_graph=True)
    assert len(recomputed) == 1
    whole.backward()
    assert len(recomputed) == 2

    with batchnorm.lean():
        y = layer(torch.randn(2, 4, 6, 6, requires_grad=True) * 1)
        loss = sum(c(y).sin().sum() for c in convs)
    del y
    torch.autograd.grad(loss, list(convs.parameters()), retain_graph=True)
    assert len(recomputed) == 3
    assert all(storage.expired() for storage in recomputed)


def views(y: Tensor) -> Tensor:
    a, b = y.chunk(2, 1)
    c = y.flatten(1) @ torch.linspace(-1, 1, y[0].numel())
    return (
        a.square().sum()
        + (b.transpose(2, 3) ** 3).sum()
        + c.sin().sum()
        + y[1:, ::2, 1:-1].exp().sum()
        + (y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]) @ torch.ones(y.shape[1], 2)).cos().sum()
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_row_23_views(layout: str) -> None:
    """Row 23: slices, transposes and flattened outputs are read from the recomputed one."""
    layer, x = norm(4, "tanh"), relaid(torch.randn(3, 4, 6, 5), layout)
    found, alive = [], []
    for around in (contextlib.nullcontext(), batchnorm.lean()):
        leaf = x.clone().requires_grad_()
        watch = Watch(layer)
        with around:
            loss = views(layer(leaf * 1))
        alive.append(watch.alive()[1])
        loss.backward()
        found.append(leaf.grad)
    assert alive == [1, 0]
    assert torch.equal(*found)


def test_row_23_a_norm_on_a_part_of_a_norm() -> None:
    """Row 23: x and residual of a norm may be views of another one's output."""
    first, second, third = norm(4), norm(2, "silu"), norm(2, "elu")
    x = torch.randn(3, 4, 6, 5)

    def run(around: AbstractContextManager[object]) -> dict[str, Tensor]:
        leaf = x.clone().requires_grad_()
        watch = Watch(nn.ModuleList([first, second, third]))
        with around:
            y = first(leaf * 1)
            z = third(second(y[:, 2:], y[:, :2]))
            loss = (z * z.sin() + y[:, 1:3]).exp().mean()
            kept = y
            del y, z
        alive.append(watch.alive()[1])
        del kept
        loss.backward()
        return {"dx": leaf.grad}

    alive: list[int] = []
    assert_identical(run(batchnorm.lean()), run(contextlib.nullcontext()))
    assert alive == [1, 3]


def test_row_23_pooling_keeps_narrow_indices() -> None:
    """Row 23: max pooling keeps an index per value: 8 bytes each, of which 6 are zero."""
    pool, x = nn.MaxPool2d(2), torch.randn(2, 8, 40, 40)
    for wide in (x, torch.randn(1, 2, 400, 400)):
        found, kept = [], []
        for around in (contextlib.nullcontext(), batchnorm.lean()):
            leaf = wide.clone().requires_grad_()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, around:
                y = pool(leaf)
            kept.append(sum(event.self_cpu_memory_usage for event in seen.key_averages()) / y.numel())
            y.square().sum().backward()
            found.append(leaf.grad)
            del y
        assert torch.equal(*found)
        assert kept == [4 + 8, 4 + (2 if wide is x else 4)]
