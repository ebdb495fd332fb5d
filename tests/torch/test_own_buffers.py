"""What no state brings is initialized, lazy layers keep what converted ones promise, and frozen ones hold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import batchnorm
from tests.torch.twins import assert_identical, scramble, state

KINDS = ["BatchNorm1d", "SyncBatchNorm"]


def full(**options: Any) -> dict[str, torch.Tensor]:
    return scramble(batchnorm.BatchNorm1d(3, **options)).state_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["assign", "assign an old state", "empty, load", "empty, reset", "load"])
@pytest.mark.parametrize("affine", [True, False])
def test_the_counter_that_no_state_brings_starts_at_zero(kind: str, how: str, affine: bool) -> None:
    options = {"nonfinite": "skip", "domains": 2, "affine": affine}
    with torch.device("cpu" if how == "load" else "meta"):
        layer = getattr(batchnorm, kind)(3, **options)
    given = full(domains=2, affine=affine)
    if how == "assign":
        layer.load_state_dict(given, assign=True)
    elif how == "assign an old state":  # of torch < 0.4.1, of one domain, without a counter of batches
        stock = {name: given[name] for name in given if not name.endswith("_1") and "num" not in name}
        layer.load_state_dict(stock, assign=True)
        for name, value in stock.items():
            assert torch.equal(layer.state_dict()[name], value)
    else:
        layer = layer if how == "load" else layer.to_empty(device="cpu")
        assert layer.skipped == 0
        layer.skipped.fill_(77)
        if how == "empty, reset":
            layer.reset_parameters()
            assert_identical(state(layer), state(getattr(batchnorm, kind)(3, **options)))
        else:
            layer.load_state_dict(given)
    assert all(not tensor.is_meta for tensor in layer.state_dict().values())
    assert layer.skipped.device.type == "cpu"
    assert layer.skipped == 0
    layer(torch.full((4, 3), float("inf")))
    assert layer.skipped == 1


def test_a_state_of_another_part_leaves_the_counter() -> None:
    model = nn.Sequential(nn.Linear(3, 3), batchnorm.BatchNorm1d(3, nonfinite="skip"))
    model[1](torch.full((4, 3), float("inf")))
    model.load_state_dict({"0.bias": torch.zeros(3)}, strict=False)
    assert model[1].skipped == 1


def test_a_counter_made_in_inference_mode_counts_outside() -> None:
    layer = batchnorm.BatchNorm1d(3)
    with torch.inference_mode():
        layer.nonfinite = "skip"
    layer(torch.full((4, 3), float("nan")))
    assert layer.skipped == 1


def lazy(dtype: torch.dtype | None = None) -> nn.Module:
    return batchnorm.convert(nn.Sequential(nn.LazyBatchNorm1d(dtype=dtype)))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["to", "constructed", "loaded", "deferred"])
def test_lazy_layers_keep_wide_statistics(half: torch.dtype, how: str) -> None:
    """A standard deviation of 300 is a variance that float16 cannot hold."""
    model = lazy(half if how == "constructed" else None)
    if how in ("to", "loaded"):
        model.to(half)
    if how == "loaded":
        stock = nn.Sequential(nn.BatchNorm1d(3))
        nn.init.constant_(stock[0].running_var, 1e6)
        model.load_state_dict(stock.state_dict())
        assert model[0].running_var.tolist() == [1e6] * 3
    for number in range(30):
        model((torch.randn(64, 3) * 300).to(torch.float32 if how == "deferred" and number == 0 else half))
        model.to(half)
    layer = model[0]
    assert type(layer) is batchnorm.BatchNorm1d
    assert (layer.running_mean.dtype, layer.running_var.dtype) == (torch.float32, torch.float32)
    assert layer.weight.dtype == half
    assert ((layer.running_var > 5e4) & (layer.running_var < 1e6)).all()


@pytest.mark.parametrize("argument", ["mask", "lengths", "residual", "input"])
def test_a_first_call_of_a_lazy_layer_takes_every_argument(argument: str) -> None:
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 5) > 0.4
    given = {
        "mask": mask,
        "lengths": torch.tensor([5, 2, 0, 4]),
        "residual": torch.randn(4, 3, 5),
        "input": x,
    }
    first, later = lazy()[0], batchnorm.BatchNorm1d(3)
    arguments = () if argument == "input" else (x,)
    if argument == "residual":
        y, expected = first(x, given["residual"]), later(x, given["residual"])
    else:
        y = first(*arguments, **{argument: given[argument]})
        expected = later(*arguments, **{argument: given[argument]})
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert_identical(state(first), state(later))


def test_lazy_layers_take_options_and_learn_their_size() -> None:
    layer = lazy()[0]
    layer.nonfinite, layer.small_batch, layer.statistics = "skip", "running", batchnorm.Ghost(2)
    layer(torch.full((4, 3), float("inf")))
    assert (layer.nonfinite, layer.small_batch, layer.statistics) == ("skip", "running", batchnorm.Ghost(2))
    assert layer.skipped == 1
    loaded = lazy()
    loaded.load_state_dict(nn.Sequential(nn.BatchNorm1d(3)).state_dict())
    loaded(torch.randn(4, 3))
    assert loaded[0].num_features == 3  # stock's own stays 0
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        lazy()[0](torch.randn(4, 3, 2, 2))


@pytest.mark.parametrize("kind", ["ours", "stock", "untouched"])
@pytest.mark.parametrize("method", ["batch", "layerwise"])
def test_calibrate_takes_sizes_from_tensors(kind: str, method: str) -> None:
    """A lazy layer that was loaded has num_features=0, which is torch's doing."""
    model, other = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyBatchNorm1d()), nn.Sequential()
    other.extend([nn.BatchNorm1d(3), nn.BatchNorm1d(3)])
    model = batchnorm.convert(model) if kind == "ours" else model
    model.load_state_dict(other.state_dict())
    if kind != "untouched":
        model(torch.randn(4, 3))
    assert [row.channels for row in batchnorm.inspect(model).rows] == [3, 3]
    data = [torch.randn(8, 3) * 2 + 1, torch.randn(5, 3)]
    for each in (model, other):
        batchnorm.calibrate(each, data, method=method)
    torch.testing.assert_close(model[0].running_var, other[0].running_var)
    torch.testing.assert_close(model[1].running_mean, other[1].running_mean)


@pytest.mark.parametrize("domain", [None, 0, 1])
def test_stock_utilities_leave_frozen_layers(domain: int | None) -> None:
    """`update_bn` resets what is a `_BatchNorm`, and the frozen statistics were mean 0 and variance 1."""
    data = [torch.randn(8, 4), torch.randn(8, 4) + 1]
    frozen, moving = (scramble(batchnorm.BatchNorm1d(4, domains=2)) for _ in range(2))
    batchnorm.freeze(frozen)
    model = nn.Sequential(frozen, moving)
    before = state(model)
    if domain is None:
        update_bn(data, model)
    else:
        with batchnorm.domain(model, domain):
            update_bn(data, model)
    after, end = state(model), f"_{domain}" if domain else ""
    assert_identical(state(frozen), {name[2:]: v for name, v in before.items() if name.startswith("0.")})
    for name in after:  # of the others, those of the domain in use move, and no others
        is_used = name.startswith("1.") and name in (f"1.running_mean{end}", f"1.running_var{end}")
        assert torch.equal(after[name], before[name]) != is_used or "num_batches" in name, name
    frozen.reset_parameters()
    assert_identical(state(frozen), state(batchnorm.BatchNorm1d(4, domains=2)))
    unfrozen = copy.deepcopy(model)
    batchnorm.unfreeze(unfrozen)
    scramble(unfrozen[0]).reset_running_stats()
    assert (unfrozen[0].running_mean == 0).all()
