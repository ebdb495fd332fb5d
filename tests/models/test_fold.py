"""`fold`: what is absorbed, by every kind of layer, before it and after it, with and without an example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import batchnorm

from .foldable import assert_equal, folded, homes, ready
from .foreign import frozen_norm, timm_norm  # noqa: F401
from .nets import Functional, resnet

BATCHED = {1: (2, 6, 9), 2: (2, 6, 7, 5), 3: (2, 6, 5, 4, 3)}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def conv(axes: int, *args: Any, transposed: bool = False, **kwargs: Any) -> nn.Module:
    return getattr(nn, f"Conv{'Transpose' if transposed else ''}{axes}d")(*args, **kwargs)


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_convolution_takes_the_norm_behind_it(
    axes: int, transposed: bool, groups: int, bias: bool, with_example: bool
) -> None:
    """Row 13: transposed, grouped and depthwise ones too, which export tools leave."""
    layer = conv(
        axes, 6, 12, 3, 2, 1, transposed=transposed, groups=groups, bias=bias, dilation=1 if transposed else 2
    )
    model = ready(nn.Sequential(layer, NORMS[axes](12)))
    x = torch.randn(BATCHED[axes], dtype=torch.float64)
    copy = folded(model, x, x if with_example else None)
    assert type(copy[0]) is type(layer)
    assert homes(model) == {"1": "0 (before)"}


@pytest.mark.parametrize("groups", [1, 2, 6], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_convolution_takes_the_norm_before_it(axes: int, groups: int) -> None:
    model = ready(nn.Sequential(nn.ReLU(), NORMS[axes](6), nn.Dropout(), conv(axes, 6, 12, 3, groups=groups)))
    x = torch.randn(BATCHED[axes], dtype=torch.float64)
    folded(model, x, x)
    folded(model, x)
    assert homes(model) == {"1": "3 (after)"}


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(6, 4, 3, padding=1), "pads with zeros"),
        (nn.Conv2d(6, 4, 3, padding="same"), "pads with zeros"),
        (nn.ConvTranspose2d(6, 4, 3), "is a transposed convolution"),
        (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), None),
        (nn.Conv2d(6, 4, 3, padding=(1, 2), padding_mode="circular"), None),
        (nn.Conv2d(6, 4, 3, padding="valid"), None),
        (nn.Conv2d(6, 4, 1, padding="same"), None),
    ],
    ids=["padded", "same", "transposed", "reflect", "circular", "valid", "same-of-one"],
)
@pytest.mark.parametrize("shift", [True, False])
def test_padding_with_zeros_allows_a_norm_without_shift_only(
    layer: nn.Module, why: str | None, shift: bool
) -> None:
    model = ready(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), layer))
    norm = model[1]
    if not shift:
        norm.running_mean.zero_()
        norm.bias.data.zero_()
    x = torch.randn(BATCHED[2], dtype=torch.float64)
    is_left = why is not None and shift
    folded(model, x, x, left=is_left)
    row = batchnorm.inspect(model, x).rows[0]
    assert why in row.stays if is_left else row.folds_into == "2 (after)", row


@pytest.mark.parametrize("with_example", [False, True])
def test_a_linear_layer_takes_it_before_and_after(with_example: bool) -> None:
    model = ready(
        nn.Sequential(
            nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3)
        )
    )
    x = torch.randn(4, 6, dtype=torch.float64)
    folded(model, x, x if with_example else None)
    assert homes(model, x) == {"1": "0 (before)", "3": "4 (after)"}


def test_two_norms_in_a_row_go_into_one_layer_each_way() -> None:
    model = ready(
        nn.Sequential(
            nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Identity(), nn.BatchNorm2d(4), nn.ReLU(),
            nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2),
        )
    )  # fmt: skip
    x = torch.randn(BATCHED[2], dtype=torch.float64)
    folded(model, x)
    folded(model, x, x)


def test_of_two_layers_that_could_the_one_before_takes_it() -> None:
    model = ready(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))
    x = torch.randn(BATCHED[2], dtype=torch.float64)
    for example in (x, None):
        folded(model, x, example)
        assert homes(model, example) == {"1": "0 (before)"}


class Fanned(nn.Module):
    """Two layers read a norm, one of them behind a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.relu())
        return self.first(y).tanh() + self.second(self.drop(y))


def test_a_norm_that_several_layers_read_goes_into_each() -> None:
    model = ready(Fanned())
    x = torch.randn(BATCHED[2], dtype=torch.float64)
    for example in (x, None):
        folded(model, x, example)
        assert homes(model, example) == {"norm": "first, second (after)"}


class Shapes(nn.Module):
    """Channels of a linear layer are on another axis than a norm's; shapes change in between."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.flat, self.flat_norm = nn.Linear(6, 7), nn.BatchNorm1d(7)
        self.conv, self.conv_norm = nn.Conv1d(7, 4, 3, padding=2), nn.BatchNorm1d(4)
        self.last_norm, self.last = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x).transpose(1, 2)).permute(0, 2, 1).sigmoid()
        z = self.flat(y)
        z = self.flat_norm(z.flatten(0, 1)).reshape_as(z).relu()
        z = self.conv_norm(self.conv(z.mT)[:, :, :-2].contiguous()).tanh()
        return self.last(self.last_norm(z).transpose(1, 2))


def test_transposed_flattened_and_cut_in_between() -> None:
    model = ready(Shapes())
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    folded(model, x, x)
    into = {"norm": "linear", "flat_norm": "flat", "conv_norm": "conv"}
    assert homes(model, x) == {k: f"{v} (before)" for k, v in into.items()} | {"last_norm": "last (after)"}
    assert_equal(model, batchnorm.fold(model, x), torch.randn(3, 6, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    "prepare",
    [lambda m, _: m, lambda m, _: batchnorm.convert(m), batchnorm.fuse],
    ids=["stock", "ours", "fused"],
)
@pytest.mark.parametrize("with_example", [False, True])
def test_a_residual_network_of_stock_of_ours_and_fused_layers(prepare: Any, with_example: bool) -> None:
    """Row 12: also where `fuse` has put additions and activations into the norms."""
    model = ready(resnet())
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    prepare(model, x)
    copy = folded(model, x, x if with_example else None)
    assert_equal(model, copy, torch.randn(2, 3, 8, 8, dtype=torch.float64))


class AddsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = batchnorm.BatchNorm2d(6, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.conv(x), residual=x)


def test_what_a_norm_of_ours_adds_and_activates_stays_in_its_place() -> None:
    model = ready(AddsItself())
    x = torch.randn(BATCHED[2], dtype=torch.float64)
    copy = folded(model, x, x)
    assert type(copy.norm).__name__ == "Folded"
    assert copy.norm.activation == "gelu"
    plain = ready(nn.Sequential(nn.Conv2d(6, 4, 1), batchnorm.BatchNorm2d(4, activation="silu")))
    assert type(folded(plain, x)[1]) is nn.SiLU


def test_norms_of_timm_leave_their_activation(timm_norm: Any) -> None:  # noqa: F811
    act = nn.PReLU(4, 0.3)
    model = ready(nn.Sequential(nn.Conv2d(6, 4, 1), timm_norm(4, act, nn.Dropout2d(0.5)), timm_norm(4)))
    x = torch.randn(BATCHED[2], dtype=torch.float64)
    copy = folded(model, x, x, left=1)
    assert type(copy[1]) is nn.PReLU
    assert type(model[1]) is timm_norm
    converted = batchnorm.fold(_converted(model), x)
    assert_equal(model, converted, x)


def _converted(model: nn.Module) -> nn.Module:
    import copy

    twin = copy.deepcopy(model)
    batchnorm.convert(twin)
    return twin


def test_frozen_and_synchronized_norms_fold(frozen_norm: Any) -> None:  # noqa: F811
    layers = [nn.Conv2d(6, 4, 1), frozen_norm(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4)]
    model = ready(nn.Sequential(*layers))
    x = torch.randn(BATCHED[2], dtype=torch.float64)
    folded(model, x, x)
    folded(model, x)


def test_a_frozen_norm_that_computes_something_else_stays(frozen_norm: Any, monkeypatch: Any) -> None:  # noqa: F811
    monkeypatch.setattr(frozen_norm, "forward", lambda self, x: x * self.weight.view(1, -1, 1, 1))
    model = ready(nn.Sequential(nn.Conv2d(6, 4, 1), frozen_norm(4)))
    x = torch.randn(BATCHED[2], dtype=torch.float64)
    folded(model, x, x, left=1)


class Standardized(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, eps=1e-6
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight.tanh()


def _parametrized(conv: nn.Module) -> nn.Module:
    parametrize.register_parametrization(conv, "weight", Doubled())
    return conv


@pytest.mark.parametrize(
    "make",
    [
        lambda: Standardized(6, 4, 3, 2, 1),
        lambda: _parametrized(nn.Conv2d(6, 4, 3, groups=2)),
        lambda: parametrizations.weight_norm(nn.Conv2d(6, 4, 3, bias=False)),
        lambda: parametrizations.spectral_norm(nn.Conv2d(6, 4, 3)),
        lambda: torch.nn.utils.spectral_norm(nn.Conv2d(6, 4, 3)),
    ],
    ids=["standardized", "parametrized", "weight-norm", "spectral-norm", "old-spectral-norm"],
)
def test_weights_that_are_computed_become_plain(make: Any) -> None:
    model = ready(nn.Sequential(make(), nn.BatchNorm2d(4), nn.ReLU(), make_alone()))
    x = torch.randn(BATCHED[2], dtype=torch.float64)
    model.train()(x)  # hooks and parametrizations have run
    copy = folded(model, x, x)
    assert type(copy[0]) is type(copy[3]) is nn.Conv2d
    assert set(copy.state_dict()) == {"0.weight", "0.bias", "3.weight"}
    assert not copy[0]._forward_pre_hooks


def make_alone() -> nn.Module:
    return Standardized(4, 3, 1, bias=False)


class Dynamic(nn.Conv2d):
    """The weight depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias, self.stride, self.padding)


class Shifted(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("kind", [Dynamic, Shifted])
def test_layers_of_unknown_classes_take_nothing(kind: Any) -> None:
    model = ready(nn.Sequential(kind(6, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(BATCHED[2], dtype=torch.float64)
    copy = folded(model, x, x, left=1)
    assert type(copy[0]) is kind
    assert "not known what it computes" in batchnorm.inspect(model, x).rows[0].stays


def test_functions_stay_around_a_norm_that_folds() -> None:
    block = Functional()
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3), block))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    folded(model, x, x, left=2)  # b and c stand behind activations
