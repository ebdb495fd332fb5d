"""The way back from `torch.nn.SyncBatchNorm`, which torch has not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from tests.models import nets
from tests.models.nets import assert_alike, refuses, scrambled

synchronised = nn.SyncBatchNorm.convert_sync_batchnorm


class Volumes(nn.Module):
    """Each norm's kind shows elsewhere: behind an activation, behind an addition, in a linear layer."""

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


@pytest.mark.parametrize("with_example", [True, False], ids=["example", "graph"])
@pytest.mark.parametrize(
    ("make", "shape"), [(nets.resnet, (4, 3, 6, 6)), (Volumes, (5, 4, 4, 4, 4))], ids=["resnet", "volumes"]
)
def test_row_7_there_and_back(make: type[nn.Module], shape: tuple[int, ...], with_example: bool) -> None:
    """Row 7: the plain layers that they were, with the parameters and buffers that they are."""
    stock = scrambled(make())
    x = torch.randn(shape, dtype=torch.float64)
    model = synchronised(copy.deepcopy(stock))
    model.register_forward_hook(lambda *_: None)
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == len(batchnorm.inspect(model).rows)
    tensors = [*model.parameters(), *model.buffers(), *model.modules()]
    assert batchnorm.revert(model, example=x if with_example else None) is model
    after = [*model.parameters(), *model.buffers(), *model.modules()]
    assert all(a is b for a, b in zip(tensors, after, strict=True))
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    _assert_back(model, stock, x)


def test_row_7_what_nothing_tells_is_refused_by_name() -> None:
    """Row 7: control flow hides what is beside a norm; an example shows it."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if x.sum() < 1e9 else x

    stock = scrambled(Hidden())
    model, x = synchronised(copy.deepcopy(stock)), torch.randn(5, 4, 3, 3, dtype=torch.float64)
    assert "norm (torch.nn.SyncBatchNorm): nothing tells the rank of its input" in refuses(
        batchnorm.revert, model
    )
    _assert_back(batchnorm.revert(model, example=x), stock, x)
    assert "nothing tells" in refuses(batchnorm.revert, nn.SyncBatchNorm(4))
    norm = batchnorm.revert(nn.SyncBatchNorm(4), example=torch.randn(3, 4, 2))
    assert type(norm) is nn.BatchNorm1d


def test_a_norm_that_receives_two_ranks_has_no_plain_layer() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.SyncBatchNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).mean((2, 3)) + self.norm(x.mean((2, 3)))

    message = refuses(lambda m: batchnorm.revert(m, example=torch.randn(5, 4, 3, 3)), Both())
    assert "norm (torch.nn.SyncBatchNorm): it is called with several" in message


def test_an_example_that_does_not_get_there_leaves_it_to_the_neighbours() -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.spare = nn.Sequential(nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = batchnorm.revert(synchronised(Twin()), example=torch.randn(5, 4, 3, 3))
    assert [type(model.used[1]), type(model.spare[1])] == [nn.BatchNorm2d, nn.BatchNorm3d]


def test_a_model_of_ours_and_synchronised_layers_reverts_as_a_whole_or_not_at_all() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), batchnorm.BatchNorm2d(4), nn.Flatten(), nn.SyncBatchNorm(16))
    assert "3 (torch.nn.SyncBatchNorm): nothing tells" in refuses(batchnorm.revert, model)
    batchnorm.revert(model, example=torch.randn(5, 3, 2, 2))
    assert [type(model[1]), type(model[3])] == [nn.BatchNorm2d, nn.BatchNorm1d]
