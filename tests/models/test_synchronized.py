"""`batchnorm.revert` of SyncBatchNorm, torch's and ours."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.errors import OptionError
from tests.models import nets
from tests.models.nets import assert_alike, refuses, scrambled

synchronized = nn.SyncBatchNorm.convert_sync_batchnorm
SYNCHRONIZED = {
    "stock": synchronized,
    "ours": batchnorm.SyncBatchNorm.convert_sync_batchnorm,
    "stock then ours": lambda model: batchnorm.convert(synchronized(model)),
    "policy": lambda model: batchnorm.convert(model, batchnorm.Synced()),
}


class Volumes(nn.Module):
    """Each norm's rank is told by another neighbour: past an activation, past an addition, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool = nn.BatchNorm3d(4), nn.AvgPool3d(2)
        self.conv, self.second = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.third, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.first(x))).flatten(2)
        x = self.second(x + self.conv(x)).mean(2)
        return self.linear(torch.tanh(self.third(x)))


def _assert_back(model: nn.Module, stock: nn.Module, x: Tensor) -> None:
    assert [type(a) for a in model.modules()] == [type(b) for b in stock.modules()]
    assert [vars(a).keys() for a in model.modules()] == [vars(b).keys() for b in stock.modules()]
    assert_alike(model, stock, x)


@pytest.mark.parametrize("how", SYNCHRONIZED)
@pytest.mark.parametrize("with_example", [True, False], ids=["example", "graph"])
@pytest.mark.parametrize(
    ("make", "shape"), [(nets.resnet, (4, 3, 6, 6)), (Volumes, (5, 4, 4, 4, 4))], ids=["resnet", "volumes"]
)
def test_row_7_there_and_back(
    make: type[nn.Module], shape: tuple[int, ...], with_example: bool, how: str
) -> None:
    """Row 7: the original plain layers, with the present parameters and buffers."""
    stock = scrambled(make())
    x = torch.randn(shape, dtype=torch.float64)
    model = SYNCHRONIZED[how](copy.deepcopy(stock))
    model.register_forward_hook(lambda *_: None)
    policies = [row.policy for row in batchnorm.inspect(model).rows]
    assert policies == ["synchronized" if how == "stock" else "synced"] * len(policies)
    tensors = [*model.parameters(), *model.buffers(), *model.modules()]
    assert batchnorm.revert(model, example=x if with_example else None) is model
    after = [*model.parameters(), *model.buffers(), *model.modules()]
    assert all(a is b for a, b in zip(tensors, after, strict=True))
    _assert_back(model, stock, x)


def test_row_7_an_unknown_rank_is_refused_by_name() -> None:
    """Row 7: control flow hides what is beside a norm; an example shows it."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if x.sum() < 1e9 else x

    stock = scrambled(Hidden())
    model, x = synchronized(copy.deepcopy(stock)), torch.randn(5, 4, 3, 3, dtype=torch.float64)
    assert "norm (torch.nn.SyncBatchNorm): nothing tells the rank of its input" in refuses(
        batchnorm.revert, model
    )
    _assert_back(batchnorm.revert(model, example=x), stock, x)
    assert "nothing tells" in refuses(batchnorm.revert, nn.SyncBatchNorm(4))
    norm = batchnorm.revert(nn.SyncBatchNorm(4), example=torch.randn(3, 4, 2))
    assert type(norm) is nn.BatchNorm1d


def test_row_6_stock_synchronized_layers_become_ours() -> None:
    """Row 6: the same module, parameters, hooks and mode; a subclass is refused, and nothing has changed."""
    stock = nn.SyncBatchNorm(4, momentum=None, eps=1e-3).half()
    heard: list[object] = []
    stock.register_forward_hook(lambda *_: heard.append(1))
    tensors = [*stock.parameters()]
    assert batchnorm.convert(stock) is stock
    assert type(stock) is batchnorm.SyncBatchNorm
    assert stock.statistics == batchnorm.Synced()
    assert all(a is b for a, b in zip(tensors, stock.parameters(), strict=True))
    assert stock.running_mean.dtype == torch.float32
    assert "process_group" not in vars(stock)
    assert stock(torch.randn(3, 4).half()).shape == (3, 4)  # alone, it is a plain layer
    assert heard

    class Special(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(4), Special(4))
    convert = batchnorm.SyncBatchNorm.convert_sync_batchnorm
    with pytest.raises(OptionError, match=r"^1 \(.*Special\): a subclass"):
        convert(model)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(OptionError, match="not initialized"):
        convert(model[0], process_group=object())
    assert type(convert(model[0], process_group=[0, 3])) is batchnorm.SyncBatchNorm
    assert model[0].statistics == batchnorm.Synced((0, 3))


def test_freezing_a_synchronized_layer_and_back() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(4))
    batchnorm.freeze(model)
    assert model[0].statistics == batchnorm.Running()
    batchnorm.unfreeze(model)
    assert model[0].statistics == batchnorm.Synced()


def test_a_policy_over_shared_statistics_has_no_way_back() -> None:
    model = batchnorm.convert(nn.Sequential(nn.BatchNorm2d(4)), batchnorm.Synced(over=batchnorm.Ghost(2)))
    assert "batchnorm.convert(model, batchnorm.Batch()) first" in refuses(batchnorm.revert, model)
    batchnorm.convert(model, batchnorm.Batch())
    assert type(batchnorm.revert(model)[0]) is nn.BatchNorm2d


def test_a_norm_that_receives_two_ranks_has_no_plain_layer() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.SyncBatchNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).mean((2, 3)) + self.norm(x.mean((2, 3)))

    message = refuses(lambda m: batchnorm.revert(m, example=torch.randn(5, 4, 3, 3)), Both())
    assert "norm (torch.nn.SyncBatchNorm): it is called with several" in message


def test_a_neighbour_tells_the_rank_where_the_example_does_not_reach() -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.spare = nn.Sequential(nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = batchnorm.revert(synchronized(Twin()), example=torch.randn(5, 4, 3, 3))
    assert [type(model.used[1]), type(model.spare[1])] == [nn.BatchNorm2d, nn.BatchNorm3d]


def test_a_model_of_ours_and_synchronized_layers_reverts_as_a_whole_or_not_at_all() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), batchnorm.BatchNorm2d(4), nn.Flatten(), nn.SyncBatchNorm(16))
    assert "3 (torch.nn.SyncBatchNorm): nothing tells" in refuses(batchnorm.revert, model)
    batchnorm.revert(model, example=torch.randn(5, 3, 2, 2))
    assert [type(model[1]), type(model[3])] == [nn.BatchNorm2d, nn.BatchNorm1d]
