"""`calibrate` in the situations that it is for: part of the data, 16 bits, averaged weights, real digits."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import batchnorm
from batchnorm.errors import DataError, InputShapeError, OptionError
from batchnorm.studies.data import load_digits
from tests.models.calibration_nets import Branches, by_hand, images
from tests.models.nets import anatomy

METHODS = ("batch", "layerwise")


class Pair(NamedTuple):
    """Samples and labels."""

    x: Tensor
    y: Tensor


def _values(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.double().transpose(0, 1).flatten(1)
    return wide.mean(1), wide.var(1, correction=1)


def _assert_statistics(norm: nn.Module, x: Tensor, rtol: float = 1e-6) -> None:
    mean, var = _values(x)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=rtol, atol=rtol)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=rtol, atol=0)


def _forms(x: Tensor, size: int) -> dict[str, list[Any]]:
    parts = x.split(size)
    return {
        "tensors": list(parts),
        "pairs": [(part, torch.arange(len(part))) for part in parts],
        "named tuples": [Pair(part, torch.arange(len(part))) for part in parts],
        "dicts": [{"input": part} for part in parts],
    }


@pytest.mark.parametrize("form", ["tensors", "pairs", "named tuples", "dicts"])
@pytest.mark.parametrize("samples", [1, 20, 23, 30, 99])
def test_it_stops_after_so_many_samples(form: str, samples: int) -> None:
    x = torch.randn(30, 3, 5)
    layer, seen = batchnorm.BatchNorm1d(3), []
    layer.register_forward_pre_hook(lambda _m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    report = batchnorm.calibrate(layer, _forms(x, 10)[form], samples=samples)
    assert report.samples == min(samples, 30)
    assert len(seen) == -(-min(samples, 30) // 10)
    _assert_statistics(layer, x[:samples])


def test_a_batch_behind_the_last_sample_is_not_asked_for() -> None:
    def batches() -> Iterator[Tensor]:
        yield from torch.randn(20, 3, 5).split(10)
        raise AssertionError("too far")

    assert batchnorm.calibrate(batchnorm.BatchNorm1d(3), batches(), samples=20).batches == 2


def test_nested_batches_are_cut_for_a_forward_of_ones_own() -> None:
    x, seen = torch.randn(12, 3, 5), []

    def forward(model: nn.Module, batch: Any) -> None:
        seen.append([len(batch["a"][0]), len(batch["a"][1]["y"]), batch["name"], len(batch["scale"])])
        model(batch["a"][0])

    data = [{"a": [part, {"y": part[:, 0]}], "name": "n", "scale": torch.ones(3)} for part in x.split(6)]
    report = batchnorm.calibrate(batchnorm.BatchNorm1d(3), data, forward=forward, samples=8)
    assert report.samples == 8
    assert seen == [[6, 6, "n", 3], [2, 2, "n", 3]]


@pytest.mark.parametrize("samples", [0, -1, 2.5, True, "3"])
def test_samples_is_a_number(samples: Any) -> None:
    with pytest.raises(OptionError, match="samples is a number of 1 or more"):
        batchnorm.calibrate(batchnorm.BatchNorm1d(3), [torch.ones(2, 3)], samples=samples)


def test_batches_without_tensors_cannot_be_counted() -> None:
    with pytest.raises(DataError, match="counts samples of batches made of tensors; got a str"):
        batchnorm.calibrate(batchnorm.BatchNorm1d(3), ["a"], samples=3, forward=lambda _m, _b: None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
def test_statistics_are_wide_where_values_are_not(norm: type[nn.Module], kind: str, method: str) -> None:
    """At offsets of a hundred deviations, a sum in bfloat16 would be lost; they are of what arrives."""
    x = images(60) + 100
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 1), norm(4))
    if kind == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    received: list[Tensor] = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        batchnorm.calibrate(model, x.split(16), method=method)
        model[4].register_forward_pre_hook(lambda _m, args: received.append(args[0]))
        first = model[0](x)
        model.eval()(x)
    assert first.dtype is torch.bfloat16
    rtol = 4e-3 if model[1].running_mean.dtype is torch.bfloat16 else 1e-6  # stock's own buffers round
    _assert_statistics(model[1], first, rtol)
    if method == "layerwise":
        _assert_statistics(model[4], received[0], rtol)


def test_a_variance_beyond_the_buffer_is_refused() -> None:
    layer = nn.BatchNorm1d(3).half()
    before = anatomy(layer)
    with pytest.raises(DataError, match=r"running statistics overflow torch\.float16"):
        batchnorm.calibrate(layer, [torch.randn(9, 3).half() * 1000])
    assert anatomy(layer) == before


def test_row_11_unequal_batches_weigh_by_their_samples() -> None:
    """Pain row 11: of batches of 64 and 2, torch's `update_bn` finds a mean of 3.02 for 0.11."""
    x = torch.cat((torch.full((64, 1), -0.0777), torch.full((2, 1), 6.1177)))
    x[:64] += torch.linspace(-0.1, 0.1, 64).view(-1, 1)
    x[64:] += torch.tensor([[-0.1], [0.1]])
    batches = x.split([64, 2])
    averaged = AveragedModel(nn.Sequential(nn.BatchNorm1d(1)))
    stock = copy.deepcopy(averaged)
    update_bn(batches, stock)
    assert stock.module[0].running_mean.item() == pytest.approx(3.02, abs=1e-4)
    batchnorm.calibrate(averaged, batches)
    _assert_statistics(averaged.module[0], x)
    assert averaged.module[0].running_mean.item() == pytest.approx(0.11, abs=1e-3)
    momentless = AveragedModel(nn.Sequential(nn.BatchNorm1d(1, momentum=None)))
    batchnorm.calibrate(momentless, batches)
    _assert_statistics(momentless.module[0], x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("average", ["equal", "exponential"])
def test_averaged_weights_get_statistics_of_their_own(average: str, method: str) -> None:
    """Pain row 11: statistics of SWA and EMA weights are those of the averaged network, not averages."""
    model, x = Branches(), images(48)
    how = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if average == "exponential" else {}
    averaged = AveragedModel(model, **how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for part in x.split(12):
        optimizer.zero_grad()
        model(part).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    batchnorm.calibrate(averaged, x.split(20) if method == "layerwise" else [x], method=method)
    expected = by_hand(averaged.module, x)
    depth = expected if method == "layerwise" else ("left.0", "right.1")
    for name in depth:
        mean, var = expected[name]
        norm = averaged.module.get_submodule(name)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=0, msg=name)


def test_row_1_the_gap_between_training_and_evaluation_closes_on_real_digits() -> None:
    """Pain row 1: trained for a few steps at momentum 0.01, it classifies in training mode only."""
    digits = load_digits()
    x, y = torch.tensor(digits.x_train).flatten(1)[:1000], torch.tensor(digits.y_train)[:1000].long()
    layers = [nn.Linear(784, 48), nn.BatchNorm1d(48, momentum=0.01), nn.ReLU()]
    layers += [nn.Linear(48, 48), nn.BatchNorm1d(48, momentum=0.01), nn.ReLU(), nn.Linear(48, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for batch in torch.randperm(1000).split(50):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()

    def accuracy(training: bool) -> float:
        other = copy.deepcopy(model).train(training)
        with torch.no_grad():
            return (other(x).argmax(1) == y).float().mean().item()

    trained, lagging = accuracy(True), accuracy(False)
    report = batchnorm.calibrate(model, x.split(64), method="layerwise")
    calibrated = accuracy(False)
    assert trained > 0.85
    assert lagging < trained - 0.05
    assert calibrated > trained - 0.01
    assert max(layer.mean_shift for layer in report.layers) > 1.0
    assert all(len(layer.mean_shifts) == len(layer.std_ratios) == 48 for layer in report.layers)
    assert all(layer.mean_shift == max(layer.mean_shifts) for layer in report.layers)


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_number_of_batches(method: str) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = []

    def batches(count: int) -> Iterator[Tensor]:
        for _ in range(count):
            part = images(4)
            alive.append(weakref.ref(part))
            yield part

    class Data:
        def __iter__(self) -> Iterator[Tensor]:
            return batches(12)

    model = Branches()
    kept: set[weakref.ref[Tensor]] = set()

    def note(_module: nn.Module, args: Any, result: Tensor) -> None:
        kept.update(weakref.ref(t) for t in (*args, result) if isinstance(t, Tensor))
        most.append(sum(ref() is not None for ref in {*kept, *alive}))

    for module in model.modules():
        module.register_forward_hook(note)
    batchnorm.calibrate(model, Data(), method=method)
    gc.collect()
    assert max(most[len(most) // 2 :]) <= max(most[: len(most) // 4])
    assert not any(ref() is not None for ref in {*kept, *alive})


def test_moments_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel that normalizes; a second look at the values would cost as much again."""
    from batchnorm.models.calibration import observers

    calls: list[int] = []
    once = observers.normalize_batch

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return once(*args, **kwargs)

    monkeypatch.setattr(observers, "normalize_batch", counted)
    monkeypatch.setattr(observers, "moments", None)
    monkeypatch.setattr(F, "batch_norm", None)
    batchnorm.calibrate(Branches(), images(8).split(4))
    assert len(calls) == 4 * 2


class Fused(nn.Module):
    """Layers with an activation and a residual, and a norm that receives their output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = batchnorm.BatchNorm2d(3, activation="silu")
        self.second = batchnorm.BatchNorm2d(3, activation="relu")
        self.third, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(self.third(self.second(y * x, residual=x)).square())


def test_layers_give_what_they_give_in_training() -> None:
    model, x = Fused().double(), images(24).double()
    trained = copy.deepcopy(model).train()
    for norm in trained.children():
        norm.momentum = 1.0
    trained(x)
    batchnorm.calibrate(model, [x])
    for name, buffer in model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffer, trained.get_buffer(name), rtol=1e-11, atol=1e-11, msg=name)


class Scaled(nn.BatchNorm2d):
    """A class that the library does not know, with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 3) / 2


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_other_classes_run_as_they_are(method: str) -> None:
    """Moments are those of the layer's input, and the next layer receives its output."""
    replaced = nn.BatchNorm2d(3)
    replaced.forward = lambda x: nn.BatchNorm2d.forward(replaced, x) + 7
    model = nn.Sequential(Scaled(3), replaced, nn.Tanh(), nn.BatchNorm2d(3)).double()
    x = images(24).double()
    before = {name: id(module.forward) for name, module in model.named_modules() if "forward" in vars(module)}
    batchnorm.calibrate(model, [x], method=method)
    _assert_statistics(model[0], x)
    found = copy.deepcopy((model[1].state_dict(), model[3].state_dict()))
    model.train(method == "batch")
    with torch.no_grad():
        first = model[0](x)
        second = model[2](model[1](first))
    for state, received in zip(found, (first, second), strict=True):
        mean, var = _values(received)
        torch.testing.assert_close(state["running_mean"], mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state["running_var"], var, rtol=1e-6, atol=0)
    after = {name: id(module.forward) for name, module in model.named_modules() if "forward" in vars(module)}
    assert after == before


def test_a_batch_of_one_value_is_refused_for_stock_layers_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(InputShapeError, match=r"^1 \(BatchNorm1d\): Expected more than 1 value per channel"):
        batchnorm.calibrate(model, [torch.randn(1, 3)])


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("method", METHODS)
def test_stock_layers_have_their_own_forward_again(method: str, error: BaseException) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), batchnorm.BatchNorm2d(3), Scaled(3), nn.Identity())

    def fail(*_: object) -> None:
        raise error

    model[3].register_forward_pre_hook(fail)
    before = anatomy(model)
    with pytest.raises(type(error)):
        batchnorm.calibrate(model, [images(4)], method=method)
    assert anatomy(model) == before


@pytest.mark.parametrize("options", [{}, {"method": "layerwise"}, {"method": "layerwise", "spill": 10**7}])
def test_a_model_that_is_a_norm_goes_by_its_class(options: dict[str, Any]) -> None:
    x = torch.randn(8, 3)
    x[2, 1] = float("nan")
    with pytest.raises(DataError, match=r"^BatchNorm1d: received NaN or inf"):
        batchnorm.calibrate(nn.BatchNorm1d(3), [x], **options)
    with pytest.raises((InputShapeError, RuntimeError), match="should contain 4 elements not 3"):
        batchnorm.calibrate(nn.BatchNorm1d(3), [torch.randn(8, 4)], **options)
    with pytest.raises(OptionError, match=r"^LazyBatchNorm1d are not initialized"):
        batchnorm.calibrate(nn.LazyBatchNorm1d(), [x], **options)
    with pytest.warns(UserWarning, match="no sample reached BatchNorm1d; left as before"):
        batchnorm.calibrate(nn.BatchNorm1d(3), [x], forward=lambda *_: None, **options)
    if options:
        with pytest.raises(
            OptionError, match=r"(for BatchNorm1d: the input|spill: BatchNorm1d is called sev)"
        ):
            batchnorm.calibrate(
                nn.BatchNorm1d(3), [torch.ones(4, 3)], forward=lambda m, b: m(m(b)), **options
            )
    report = batchnorm.calibrate(nn.BatchNorm1d(3), [torch.randn(8, 3)], **options)
    assert str(report).splitlines()[2].startswith("BatchNorm1d ")
