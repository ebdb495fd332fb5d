"""`fold` through sums, concatenations and averages, and into a convolution that is added to a norm.

Row 61: the branches of RepVGG, MobileOne and TextNet; FactorizedReduction of NASNet, mixed convolutions.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm

from .foldable import assert_equal, folded, homes, ready, reasons

X = (2, 4, 6, 5)
Body = Callable[[Any, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Joined(nn.Module):
    """Convolutions of one input and of four channels, and norms of four and eight; `body` calls them."""

    def __init__(self, body: Body, *, groups: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=bias)
        self.one = nn.Conv2d(4, 4, 1, groups=groups)
        self.tall = nn.Conv2d(4, 4, (3, 1), padding="same", dilation=2)
        self.strided = nn.Conv2d(4, 4, 3, 2, padding=1)
        self.even = nn.Conv2d(4, 4, 2)
        self.norm, self.wide = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
        self.mix, self.linear = nn.Conv2d(8, 3, 1), nn.Linear(4, 3)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def added(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) + m.one(x) + m.norm(x)


def norm_first(m: Any, x: Tensor) -> Tensor:
    return 0 + m.norm(x) + m.conv(x)


def subtracted(m: Any, x: Tensor) -> Tensor:
    return (m.one(x) - (m.norm(x) - m.conv(x))).relu()


def added_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y += m.one(x)
    y += m.norm(x)
    return y


def over_the_norm(m: Any, x: Tensor) -> Tensor:
    """What the identity gives is written over."""
    y = m.norm(x)
    y += m.one(x)
    y.add_(m.conv(x))
    return y.relu()


def dilated(m: Any, x: Tensor) -> Tensor:
    return m.tall(x) + m.norm(x)


def behind_another_norm(m: Any, x: Tensor) -> Tensor:
    """The convolution takes the norm behind the sum, too, which is scaled after the one beside it."""
    y = m.conv(x) + m.norm(x)
    return m.wide(torch.cat([y, m.one(x)], 1)).sigmoid()


def only_subtracted_is_left(m: Any, x: Tensor) -> Tensor:
    """The norm beside the convolution is zero, so that the shift goes in with the convolution's sign."""
    return m.wide(torch.cat([m.norm(x) - m.conv(x), m.one(x)], 1)).sigmoid()


def concatenated(m: Any, x: Tensor) -> Tensor:
    """NASNet's FactorizedReduction and MixNet: a norm behind the halves."""
    return m.wide(torch.cat([m.conv(x), m.one(x)], dim=-3)).relu()


def sum_before(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x) - m.one(x.tanh())).relu()


def into_a_concatenation(m: Any, x: Tensor) -> Tensor:
    return m.mix(torch.cat([x.sin(), m.norm(x.tanh())], 1))


def averaged(m: Any, x: Tensor) -> Tensor:
    return m.linear(m.norm(x.tanh()).mean((2, 3))) + m.linear(m.norm(x.sin()).mean((2, 3)))


def pooled(m: Any, x: Tensor) -> Tensor:
    return m.norm(F.avg_pool2d(m.conv(x), 2, ceil_mode=True)).relu()


def upsampled(m: Any, x: Tensor) -> Tensor:
    return m.norm(F.interpolate(m.conv(x), scale_factor=2, mode="bilinear", antialias=False)).relu()


HOMES: dict[Body, dict[str, str]] = {
    added: {"norm": "conv (beside)"},
    norm_first: {"norm": "conv (beside)"},
    subtracted: {"norm": "one within conv (beside)"},
    added_in_place: {"norm": "conv (beside)"},
    over_the_norm: {"norm": "one within conv (beside)"},
    dilated: {"norm": "tall (beside)"},
    behind_another_norm: {"norm": "conv (beside)", "wide": "conv, one (before)"},
    only_subtracted_is_left: {"norm": "conv (beside)", "wide": "conv, one (before)"},
    concatenated: {"wide": "conv, one (before)"},
    sum_before: {"norm": "conv, one (before)"},
    into_a_concatenation: {"norm": "mix (after)"},
    averaged: {"norm": "linear (after)"},
    pooled: {"norm": "conv (before)"},
    upsampled: {"norm": "conv (before)"},
}


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (2, False), (4, True)])
@pytest.mark.parametrize("body", HOMES, ids=lambda body: body.__name__)
def test_a_norm_goes_into_all_that_is_joined(body: Body, groups: int, bias: bool) -> None:
    model = ready(Joined(body, groups=groups, bias=bias))
    x = torch.randn(X, dtype=torch.float64)
    unused = sum(name not in HOMES[body] for name in ("norm", "wide"))
    twin = folded(model, x, x, left=unused)
    found = homes(model, x)
    assert {name: found[name] for name in HOMES[body]} == HOMES[body]
    assert_equal(model, twin, torch.randn(1, 4, 10, 8, dtype=torch.float64))  # holds for other sizes


class RepVGG(nn.Module):
    """A block as its authors write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(channels)
        conv = (nn.Conv2d(channels, channels, size, padding=size // 2, bias=False) for size in (3, 1))
        self.rbr_dense, self.rbr_1x1 = (nn.Sequential(part, nn.BatchNorm2d(channels)) for part in conv)

    def forward(self, inputs: Tensor) -> Tensor:
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return F.relu(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out)


def test_the_copy_of_a_branched_network_is_a_module_like_any_other() -> None:
    model, x = ready(nn.Sequential(RepVGG(4), RepVGG(4)), torch.float32), torch.randn(X)
    twin = folded(model, x, x, tolerance=1e-5)
    assert_equal(twin, pickle.loads(pickle.dumps(twin)), x, 0.0)
    assert_equal(twin, batchnorm.fold(copy.deepcopy(twin), x), x, 0.0)
    with torch.no_grad():
        wanted = twin(x)
        exported = torch.export.export(twin, (x,)).module()(x)
    torch.testing.assert_close(exported, wanted, rtol=1e-6, atol=1e-6)
    assert {name.rpartition(".")[2] for name in twin.state_dict()} == {"weight", "bias"}


def other_axis(m: Any, x: Tensor) -> Tensor:
    return m.norm(torch.cat([m.conv(x), m.one(x)], 2)).relu()


def other_axis_of_averages(m: Any, x: Tensor) -> Tensor:
    return m.linear(m.norm(x.tanh()).mean(1)[..., :4])


def twice_in_a_concatenation(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.wide(torch.cat([y, y], 1)).relu()


def one_convolution_for_both_halves(m: Any, x: Tensor) -> Tensor:
    return m.wide(torch.cat([m.conv(x), m.conv(x.tanh())], 1)).relu()


def one_convolution_added_twice(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x) + m.conv(x.tanh())).relu()


def half_is_no_layer(m: Any, x: Tensor) -> Tensor:
    return m.wide(torch.cat([m.conv(x), x], 1)).relu()


def half_is_read(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return m.wide(torch.cat([y, m.one(x)], 1)).relu(), y


def sum_is_read(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x) + m.one(x)
    return m.norm(y) + y.tanh()


def other_stride(m: Any, x: Tensor) -> Tensor:
    return m.strided(x) + m.norm(x)[..., ::2, ::2]


def no_middle(m: Any, x: Tensor) -> Tensor:
    return F.pad(m.even(x), (0, 1, 0, 1)) + m.norm(x)


def other_input(m: Any, x: Tensor) -> Tensor:
    return m.conv(x.tanh()) + m.norm(x)


def input_written_between(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    y = m.conv(x)
    x.mul_(2)
    return y + m.norm(x)


def branch_is_read(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return y + m.norm(x) + y.tanh()


def norm_is_read(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.conv(x) + y + y.tanh()


def scaled_sum(m: Any, x: Tensor) -> Tensor:
    return torch.add(m.conv(x), m.norm(x), alpha=2)


def mixed_dtypes(m: Any, x: Tensor) -> Tensor:
    return m.norm((m.conv(x) + m.one(x).float()).double()).relu()


def branch_called_twice(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) + m.norm(x) + m.conv(x.tanh()).tanh()


def broadcast(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x) + m.one(x.mean((2, 3), keepdim=True))).relu()


def padded_average(m: Any, x: Tensor) -> Tensor:
    return m.norm(F.avg_pool2d(m.conv(x), 3, 2, padding=1)).relu()


def maximum(m: Any, x: Tensor) -> Tensor:
    return m.norm(F.max_pool2d(m.conv(x), 2)).relu()


LEFT: dict[Body, tuple[str, str]] = {
    other_axis: ("norm", "before it is cat"),
    other_axis_of_averages: ("norm", "after it is mean"),
    twice_in_a_concatenation: ("wide", "its input is read 2 times (by itself)"),
    one_convolution_for_both_halves: ("wide", "called for different channels"),
    one_convolution_added_twice: ("norm", "called for different channels"),
    half_is_no_layer: ("wide", "before it is cat, and its input is read 2 times"),
    half_is_read: ("wide", "read 2 times (the model's output)"),
    sum_is_read: ("norm", "its input is read 2 times (tanh)"),
    other_stride: ("norm", "after it is add"),
    no_middle: ("norm", "no layer that reads the same is added"),
    other_input: ("norm", "no layer that reads the same is added"),
    input_written_between: ("norm", "no layer that reads the same is added"),
    branch_is_read: ("norm", "conv (Conv2d) is read by something else"),
    norm_is_read: ("norm", "after it is add"),
    scaled_sum: ("norm", "after it is add"),
    mixed_dtypes: ("norm", "before it is add; after it is relu"),
    branch_called_twice: ("norm", "conv (Conv2d) is called 2 times"),
    broadcast: ("norm", "before it is add"),
    padded_average: ("norm", "before it is avg_pool2d"),
    maximum: ("norm", "before it is max_pool2d_with_indices"),
}


@pytest.mark.parametrize("body", LEFT, ids=lambda body: body.__name__)
def test_what_cannot_be_joined_exactly_is_left(body: Body) -> None:
    model = ready(Joined(body))
    x = torch.randn(X, dtype=torch.float64)
    name, words = LEFT[body]
    assert words in reasons(model, x)[name], reasons(model, x)
    twin = batchnorm.fold(model, x)
    assert isinstance(getattr(twin, name), nn.BatchNorm2d)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model.eval()(x), rtol=1e-10, atol=1e-10)


def _even(conv: Any) -> None:
    """A kernel of even size, which gives as many outputs as inputs but has no middle."""
    conv.kernel_size, conv.padding, conv.dilation = (4, 1), (3, 0), (2, 1)
    conv.weight = nn.Parameter(torch.randn(4, 4, 4, 1, dtype=torch.float64))


def _strided(conv: Any) -> None:
    conv.stride = (2, 1)


def _hooked(conv: Any) -> None:
    conv.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "words"), [(_strided, "a stride"), (_even, "has no middle"), (_hooked, "has hooks")]
)
def test_a_convolution_that_cannot_give_its_input_takes_no_norm_beside_it(change: Any, words: str) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.conv(x) + m.norm(x)

    model = ready(Joined(body))
    change(model.conv)
    x = torch.randn(2, 4, 1, 5, dtype=torch.float64)  # so small that a stride along it does not show
    assert words in reasons(model, x)["norm"]
    folded(model, x, x, left=2)
