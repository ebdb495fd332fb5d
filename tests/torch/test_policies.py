"""`statistics=`: which mean and variance a layer takes, and that it keeps to it."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import OptionError
from batchnorm.torch.lazy import LazyBatchNorm2d
from tests.torch.test_layers import SHAPES
from tests.torch.twins import assert_identical, scramble, state, step, twins


def frozen(kind: str = "BatchNorm2d", channels: int = 5, **options: object) -> nn.Module:
    """Return a layer with a past, in training, frozen."""
    return scramble(getattr(batchnorm, kind)(channels, statistics=batchnorm.Running(), **options))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_row_4_a_frozen_layer_in_training_is_a_stock_one_in_evaluation(
    kind: str, momentum: float | None
) -> None:
    """Row 4: whoever calls `train()`, output and gradients are those of evaluation, and nothing moves."""
    stock, _ = twins(kind, 5, momentum=momentum, dtype=torch.float64)
    layer = frozen(kind, momentum=momentum, dtype=torch.float64)
    layer.load_state_dict(stock.state_dict())
    x, dy = (2 * torch.randn(SHAPES[kind], dtype=torch.float64) + 1 for _ in range(2))
    expected = step(stock.eval(), x, dy)
    for holder in (layer, nn.Sequential(layer), nn.ModuleList([nn.Sequential(layer)])):
        holder.train()
        assert layer.training
        found = step(layer, x, dy)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)
        assert_identical(state(layer), state(stock))
    layer.statistics = batchnorm.Batch()
    assert (step(layer, x, dy)["y"] - expected["y"]).abs().max() > 0.1
    assert layer.num_batches_tracked == 4


def test_a_frozen_batch_of_one_and_an_empty_one_pass() -> None:
    """Row 19: given statistics need no second value."""
    layer = frozen("BatchNorm1d")
    assert layer(torch.randn(1, 5)).isfinite().all()
    assert layer(torch.randn(0, 5)).shape == (0, 5)


def test_a_call_in_training_keeps_and_computes_what_one_in_evaluation_does() -> None:
    """The same bytes for the backward and the same bits: it is the same call."""
    layer, x = frozen(activation="silu"), torch.randn(4, 5, 6, 6, requires_grad=True)
    residual, found = torch.randn(4, 5, 6, 6), []
    for training in (True, False):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t
        ):
            found.append((layer.train(training)(x, residual), kept))
    assert torch.equal(found[0][0], found[1][0])
    assert sorted(found[0][1]) == sorted(found[1][1])


class Cut(torch.autograd.Function):
    """Its backward gives no gradient."""

    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(*_: object) -> None:
        return None


@pytest.mark.parametrize("policy", [batchnorm.Batch, batchnorm.Running, batchnorm.Adapted, batchnorm.Renorm])
def test_where_no_gradient_comes_none_goes_on(policy: type) -> None:
    """As torch.nn: not one of zeros, by which an optimizer with momentum or weight decay would step."""
    layer, x = batchnorm.BatchNorm1d(5, statistics=policy()), torch.randn(4, 5, requires_grad=True)
    Cut.apply(layer(x)).square().sum().backward()
    assert (x.grad, layer.weight.grad, layer.bias.grad) == (None, None, None)


def test_a_policy_is_plain_data() -> None:
    for policy in (batchnorm.Batch(), batchnorm.Running()):
        assert repr(policy) == f"{type(policy).__name__}()"
        assert type(policy)(**dataclasses.asdict(policy)) == policy
        assert pickle.loads(pickle.dumps(policy)) == policy
        assert hash(policy) == hash(copy.deepcopy(policy))
        with pytest.raises(dataclasses.FrozenInstanceError):
            policy.name = "other"
    assert batchnorm.Batch() != batchnorm.Running()


def test_it_shows_where_it_is_not_the_stock_layers() -> None:
    assert "statistics" not in repr(batchnorm.BatchNorm2d(3))
    assert "statistics=Running(), activation=relu)" in repr(frozen(activation="relu"))


def test_a_shallow_copy_has_its_policy() -> None:
    layer, x = frozen(), torch.randn(4, 5, 3, 3)
    twin = copy.copy(layer)
    assert twin.statistics == batchnorm.Running()
    assert torch.equal(twin(x), layer(x))


def test_a_pickle_of_before_there_were_policies_has_the_batchs() -> None:
    layer = batchnorm.BatchNorm2d(5)
    del vars(layer)["_statistics"]
    assert pickle.loads(pickle.dumps(layer)).statistics == batchnorm.Batch()


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"BatchNorm2d: .*has none: make it with track_running_stats=True"):
        batchnorm.BatchNorm2d(3, track_running_stats=False, statistics=batchnorm.Running())
    with pytest.raises(OptionError, match=r"statistics must be .* got <class"):
        batchnorm.BatchNorm2d(3, statistics=batchnorm.Running)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batchnorm.BatchNorm2d(3, track_running_stats=False)

        def freeze(self) -> None:
            self.norm.statistics = batchnorm.Running()

    model = Model()
    with pytest.raises(OptionError, match=r"^norm \(BatchNorm2d\): "):
        model.freeze()
    assert model.norm.statistics == batchnorm.Batch()
    with pytest.raises(OptionError, match="got 'running'"):
        frozen().statistics = "running"


def test_lazy_layers_hand_their_policy_on() -> None:
    """The first call is the frozen layer's already; a call past the hook raises as stock's does."""
    layer = LazyBatchNorm2d()
    with pytest.raises(ValueError, match="uninitialized parameter"):
        layer.forward(torch.randn(4, 3, 5, 5))
    layer.statistics = batchnorm.Running()
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(layer(x), x, rtol=1e-4, atol=1e-4)  # mean 0, var 1
    assert type(layer) is batchnorm.BatchNorm2d
    assert layer.statistics == batchnorm.Running()
    assert layer.num_batches_tracked == 0
    untracked = LazyBatchNorm2d(track_running_stats=False)
    with pytest.raises(OptionError, match="running statistics"):
        untracked.statistics = batchnorm.Running()


def test_row_29_a_frozen_layer_exports_as_in_evaluation() -> None:
    """Row 29: the mode of the exported norm is evaluation, although the layer is in training."""
    layer = frozen(eps=0.25)
    x = torch.randn(4, 5, 3, 3)
    program = torch.export.export(layer, (x,))
    (norm,) = (node for node in program.graph.nodes if node.op == "call_function")  # and no counter
    schema = dict(zip((a.name for a in norm.target._schema.arguments), norm.args, strict=False)) | norm.kwargs
    assert schema["training"] is False
    torch.testing.assert_close(program.module()(x), layer(x))


def test_row_30_functional_transforms_write_nothing() -> None:
    """Row 30: frozen, a layer in training is pure."""
    layer = frozen("BatchNorm1d").double()
    before = state(layer)
    x = torch.randn(3, 4, 5, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(x)
    leaf = x.clone().requires_grad_()
    sum(loss(part) for part in leaf).backward()
    torch.testing.assert_close(found, leaf.grad)
    assert_identical(state(layer), before)
