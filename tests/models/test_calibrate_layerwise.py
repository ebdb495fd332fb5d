"""`calibrate(method="layerwise")`: the same at any depth for any split, and right or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import DataError, OptionError
from tests.models.calibration_nets import (
    NETWORKS,
    WAYS,
    Again,
    Branches,
    Chained,
    Hidden,
    Routed,
    Swapped,
    by_hand,
    images,
)
from tests.models.nets import anatomy, refuses, scrambled

SPLITS = {"whole": [203], "ragged": [64, 64, 64, 11], "sevens": [29] * 7, "singles": [1] * 203}


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def _layerwise(model: nn.Module, data: object, **options: object) -> object:
    return batchnorm.calibrate(model, data, method="layerwise", **options)


def _assert_expected(model: nn.Module, expected: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (mean, var) in expected.items():
        norm, std = _norms(model)[name], var.sqrt().max()
        error = (norm.running_mean.double() - mean).abs().max() / std
        assert error < 1e-6 + mean.abs().max() / std * 1e-6, f"{name}: mean off by {error:.3g} std"
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-6, atol=0, msg=name)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("network", ["residual", "branches", "dense"])
def test_any_split_gives_the_statistics_of_the_deployed_network(network: str, split: str) -> None:
    """Pain row 1: at every depth, in float32, against float64 norm after norm on all data at once."""
    model, x = NETWORKS[network](), images(203)
    for norm in _norms(model).values():
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    expected = by_hand(model, x)
    report = _layerwise(model, x.split(SPLITS[split]))
    _assert_expected(model, expected)
    assert all(layer.exact for layer in report.layers)
    assert {layer.name for layer in report.layers} == expected.keys()


@pytest.mark.parametrize("network", NETWORKS)
def test_it_is_exact_in_float64(network: str) -> None:
    model, x = scrambled(NETWORKS[network]()), images(30).double()
    expected = by_hand(model, x)
    before = copy.deepcopy(model.state_dict())
    _layerwise(model, x.split([7, 7, 7, 9]))
    after = model.state_dict()
    for name, (mean, var) in expected.items():
        torch.testing.assert_close(after.pop(f"{name}.running_mean"), mean, rtol=1e-11, atol=1e-11, msg=name)
        torch.testing.assert_close(after.pop(f"{name}.running_var"), var, rtol=1e-11, atol=0, msg=name)
    torch.testing.assert_close(after, {k: before[k] for k in after}, rtol=0, atol=0)


def test_parallel_branches_share_a_pass_and_forwards_end_early() -> None:
    model = Branches()
    calls = []
    model.join.register_forward_pre_hook(lambda *_: calls.append(1))
    report = _layerwise(model, images(40).split(10))
    assert report.passes == 3  # left.0 and right.1; left.3; join
    assert len(calls) == 1 + 1 + 4  # the first forward of each pass is whole, and the last pass
    assert "4 batches, 3 passes" in str(report)
    assert "*" not in str(report)


def test_the_result_depends_on_no_earlier_statistics() -> None:
    one, other, x = (scrambled(NETWORKS["residual"]()) for _ in range(2)), None, images(20).double()
    one, other = one
    other.load_state_dict({**one.state_dict(), **_running(other)})
    for model in (one, other):
        _layerwise(model, x.split(8))
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def _running(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.rand_like(b) + 1e3 for n, b in model.state_dict().items() if "running" in n}


@pytest.mark.parametrize("way", WAYS)
def test_dependence_is_seen_through_whatever_a_forward_does(way: str) -> None:
    model, x = Hidden(WAYS[way]).double(), images(24).double()
    expected = by_hand(model, x) if way != "our layer" else None
    report = _layerwise(model, [x])
    assert report.passes == 2
    if expected is not None:
        _assert_expected(model, expected)


def test_what_depends_on_no_norm_takes_one_pass() -> None:
    model = Hidden(lambda _y, x: x.clone().mul_(2)).double()
    assert _layerwise(model, images(24).double().split(8)).passes == 1


def test_an_order_that_depends_on_the_batch_is_right() -> None:
    """The first batch shows neither all the calls nor all the dependences."""
    model, x = Routed().double(), images(60).double()
    x[:10, 0, 0, 0], x[10:20, 0, 0, 0], x[20:, 0, 0, 0] = -1.0, 1.0, -1.0
    report = _layerwise(model, x.split(10))
    with torch.no_grad():
        first = _normalized(x, x, model.first.eps)
        second = _normalized(first[10:20].relu(), first[10:20].relu(), model.second.eps)
    received = {
        "first": x,
        "second": first[10:20].relu(),
        "third": torch.cat((first[:10], second, first[20:])),
    }
    for name, values in received.items():
        wide = values.transpose(0, 1).flatten(1)
        norm = model.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, wide.mean(1), rtol=1e-11, atol=1e-11, msg=name)
        torch.testing.assert_close(norm.running_var, wide.var(1), rtol=1e-11, atol=0, msg=name)
    assert [layer.values for layer in report.layers] == [60 * 16, 10 * 16, 60 * 16]


def test_a_call_that_the_first_batch_does_not_show_is_heard() -> None:
    """Forwards were ended too early for it: seen in the end, and all is done again with whole ones."""
    model, x = Again().double(), images(60).double()
    x[:30, 0, 0, 0], x[30:, 0, 0, 0] = -1.0, 1.0
    report = _layerwise(model, x.split(10))
    received = torch.cat((x, 2 * x[30:])).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.first.running_mean, received.mean(1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.first.running_var, received.var(1), rtol=1e-11, atol=0)
    assert report.passes == 4


def _normalized(x: Tensor, values: Tensor, eps: float) -> Tensor:
    wide = values.transpose(0, 1).flatten(1)
    mean, var = (s.view(-1, 1, 1) for s in (wide.mean(1), wide.var(1)))
    return (x - mean) / (var + eps).sqrt()


def test_a_norm_on_its_own_output_is_refused_by_name() -> None:
    assert "no order for norm: the input" in refuses(_layerwise, Chained(), images(8).split(4))


def test_norms_that_change_places_are_refused_by_name() -> None:
    x = images(20)
    x[:10, 0, 0, 0], x[10:, 0, 0, 0] = -1.0, 1.0
    assert "no order for a, b: the input" in refuses(_layerwise, Swapped(), x.split(10))


def test_an_iterator_is_refused_before_anything_runs() -> None:
    def batches() -> Iterator[Tensor]:
        raise AssertionError("not to be run")
        yield

    message = refuses(_layerwise, Branches(), batches())
    assert "goes over data several times, and a generator is used up" in message


class _Shrinking:
    """Data with fewer samples the second time."""

    def __init__(self) -> None:
        self.left = 3

    def __iter__(self) -> Iterator[Tensor]:
        self.left -= 1
        return iter(images(8).split(4)[: self.left])


def test_data_that_changes_from_pass_to_pass_is_refused() -> None:
    message = refuses(_layerwise, Branches(), _Shrinking())
    assert "8 samples in the first pass and 4 in pass 2" in message


@pytest.mark.parametrize("number", [1, 5, 9])
def test_an_error_in_any_pass_leaves_the_model_as_it_was(number: int) -> None:
    model, calls = Branches(), []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt

    model.stem.register_forward_hook(fail)
    before = anatomy(model)
    with pytest.raises(KeyboardInterrupt):
        _layerwise(model, images(16).split(4))
    assert anatomy(model) == before


def test_nan_is_refused_by_the_layer_that_received_it() -> None:
    x = images(8)
    x[3, 1] = float("nan")
    with pytest.raises(DataError, match=r"received NaN or inf"):
        _layerwise(Branches(), x.split(4))


def test_unreached_layers_are_named() -> None:
    model = Branches()
    model.spare = nn.BatchNorm2d(3)
    with pytest.warns(UserWarning, match="no sample reached spare") as caught:
        report = batchnorm.calibrate(model, images(8).split(4), method="layerwise")
    assert caught[0].filename == __file__
    assert report.unreached == ("spare",)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(OptionError, match="method is 'batch' or 'layerwise'; got 'exact'"):
        batchnorm.calibrate(Branches(), images(8).split(4), method="exact")


def test_a_compiled_model_is_heard_too() -> None:
    model, x = Branches(), images(12)
    twin = copy.deepcopy(model)
    model.left = torch.compile(model.left, backend="eager")
    model.right.compile(backend="eager")
    with torch.no_grad():
        model.eval()(x)
    for one in (model, twin):
        _layerwise(one, x.split(5))
    found = {n.replace("_orig_mod.", ""): b for n, b in model.named_buffers() if "running" in n}
    torch.testing.assert_close(found, {n: b for n, b in twin.named_buffers() if "running" in n})
