"""`diagnose` with data: each fault is found at the weakest strength that costs a point of accuracy."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.errors import DataError
from tests.models.test_verbs import picture

from .diagnosed import accuracy, applied, batches, checks, only, samples, trained


def test_a_healthy_model_has_no_finding() -> None:
    found = batchnorm.diagnose(trained(), batches())
    assert found.findings == (), found
    assert found.measure == "accuracy"
    assert found.scores["running"] == pytest.approx(accuracy(trained()))
    assert found.scores["population"] == pytest.approx(found.scores["running"], abs=0.01)
    assert found.cost.samples == 512
    assert found.cost.forwards < 5
    assert [layer.layer for layer in found.layers] == ["1", "4"]
    assert all(layer.mean_off < 1e-3 and layer.std_ratio < 1.001 for layer in found.layers)
    assert found.unchecked == ()


@pytest.mark.parametrize("strength", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("layer", ["1", "4"])
def test_statistics_that_are_off_are_found_where_they_cost_a_point(strength: float, layer: str) -> None:
    """Row 44: the gap is measured, its layer named, and `calibrate` closes it."""
    model = trained()
    whole = accuracy(model)
    norm = model.get_submodule(layer)
    generator = torch.Generator().manual_seed(0)
    shift = strength * norm.running_var.sqrt()
    norm.running_mean += shift * torch.randn(16, generator=generator)
    lost = whole - accuracy(model)
    found = batchnorm.diagnose(model, batches())
    off = only(found, "statistics-off")
    assert off.layer == layer
    expected = float(torch.randn(16, generator=torch.Generator().manual_seed(0)).square().mean().sqrt())
    assert off.evidence["mean_off"] == pytest.approx(strength * expected, rel=0.02)
    if lost >= 0.01:
        assert off.severity == "likely"
        assert off.evidence["gain"] == pytest.approx(lost, abs=0.01)
    if lost >= 0.03:  # below, as many may be right or wrong by chance
        gap = only(found, "gap")
        assert gap.severity == ("serious" if lost > 0.06 else gap.severity)
        assert gap.severity in ("serious", "likely")
        assert gap.evidence["gain"] == pytest.approx(lost, abs=0.01)
    assert strength < 3 or lost > 0.06
    applied(off, model=model, data=batches())
    assert accuracy(model) == pytest.approx(whole, abs=0.005)
    assert batchnorm.diagnose(model, batches()).findings == ()


@pytest.mark.parametrize("strength", [1.0, 2.0, 4.0])
def test_another_distribution_is_found_with_the_gain_of_adapting(strength: float) -> None:
    model = trained()
    x, y = samples()
    other = list(zip((x * (1 + strength) + strength).split(64), y.split(64), strict=True))
    found = batchnorm.diagnose(model, other)
    gap = only(found, "gap")
    with torch.no_grad():
        lost = gap.evidence["population"] - gap.evidence["running"]
        assert lost >= 0.01
        adapted = batchnorm.convert(copy.deepcopy(model), batchnorm.Adapted())
        correct = [(adapted(a).argmax(1) == b).float().mean() for a, b in other]
    assert gap.evidence["adapted"] == pytest.approx(float(torch.stack(correct).mean()), abs=1e-6)
    assert gap.evidence["adapted"] > gap.evidence["running"]
    assert "batchnorm.convert(model, batchnorm.Adapted())" in gap.remedy
    x, y = (of[y.argsort()] for of in (x, y))  # of one class each: a batch is nothing to adapt to
    model[4].running_mean += 2 * model[4].running_var.sqrt()
    gap = only(batchnorm.diagnose(model, list(zip(x.split(32), y.split(32), strict=True))), "gap")
    assert (gap.evidence["adapted"] > gap.evidence["running"]) == ("Adapted" in gap.remedy)


class Regression(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_losses_and_outputs_show_a_gap_where_there_are_no_classes() -> None:
    model = trained()
    x, _ = samples()
    with torch.no_grad():
        targets = model(x) + 0.1
    model[4].running_mean += 1.0
    found = batchnorm.diagnose(Regression(model), list(zip(x.split(64), targets.split(64), strict=True)))
    assert (found.measure, only(found, "gap").severity) == ("loss", "likely")
    assert found.scores["population"] < 0.1 * found.scores["running"]
    found = batchnorm.diagnose(model, x.split(64))
    assert (found.measure, only(found, "gap").severity) == ("difference of outputs", "note")
    assert found.scores["running"] > 0.05


@pytest.mark.parametrize("where", ["model", "layer", "untracked"])
def test_predictions_that_depend_on_neighbours(where: str) -> None:
    """Row 33: a forgotten eval(), of the model or of a part of it. Row 60: batch-mates that mix."""
    model = trained()
    if where == "model":
        model.train()
    elif where == "layer":
        model[4].train()
    else:
        model[4] = nn.BatchNorm1d(16, track_running_stats=False).eval()
    finding = only(batchnorm.diagnose(model, batches()), "batch-mates")
    layer = "1" if where == "model" else "4"
    assert (finding.severity, finding.layer) == ("likely" if where == "model" else "serious", layer)
    if where != "untracked":
        applied(finding, model=model)
        assert batchnorm.diagnose(model, batches()).findings == ()


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_another_layer_that_mixes_samples_is_named() -> None:
    model = trained()
    model.insert(3, Mixing())
    assert only(batchnorm.diagnose(model, batches()), "batch-mates").layer == "3"


class Sequences(nn.Module):
    """Tokens padded to one length; every convolution sees what norms made of the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 8, 3, padding=1, bias=False)
        self.norm = batchnorm.BatchNorm1d(8)
        self.second = nn.Conv1d(8, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            return self.second(self.norm(self.first(x)))
        with batchnorm.mask(self.norm, lengths=lengths, size=x.shape[2]):
            return self.second(self.norm(self.first(x)))


@pytest.mark.parametrize("bias", [0.01, 0.1, 1.0])
def test_padding_that_is_read_is_found_and_masked(bias: float) -> None:
    """Row 54: a prediction depends on padding, by the first layer that reads it."""
    torch.manual_seed(0)
    model = Sequences().eval()
    nn.init.constant_(model.norm.bias, bias)
    lengths = torch.tensor([20, 12, 7, 16])
    x = torch.randn(4, 3, 20) * (torch.arange(20) < lengths[:, None])[:, None]
    for batch in (x, {"x": x}):
        finding = only(batchnorm.diagnose(model, [batch]), "padding")
        assert (finding.severity, finding.layer) == ("likely", "second")
    model.train()
    assert only(batchnorm.diagnose(model, [x]), "padding").layer == "norm"
    model.eval()
    found = batchnorm.diagnose(model, [{"x": x, "lengths": lengths}])
    assert "padding" not in {f.check for f in found.findings}
    scope = applied(finding, model=model, x=x, lengths=lengths)
    with torch.no_grad():
        torch.testing.assert_close(scope["y"], model(x, lengths))


def test_means_of_samples_leave_padding_out() -> None:
    """Batches of sequences, sorted by length as a sampler does it, differ in their padding only."""
    lengths = torch.arange(1, 257).repeat_interleave(1)
    x = torch.randn(256, 3, 256, generator=torch.Generator().manual_seed(0)) + 1
    x *= (torch.arange(256) < lengths[:, None])[:, None]
    dicts = [{"x": a, "lengths": b} for a, b in zip(x.split(16), lengths.split(16), strict=True)]
    model = Sequences().eval()
    model.first = nn.Identity()  # the norm receives the samples
    model.norm, model.second = batchnorm.BatchNorm1d(3), nn.Identity()
    model.eval()
    found = batchnorm.diagnose(model, dicts)
    assert "ordered-batches" not in {f.check for f in found.findings}
    assert "ordered-batches" in {f.check for f in batchnorm.diagnose(model, x.split(16)).findings}


@pytest.mark.parametrize("size", [2, 4, 8])
def test_small_batches_are_found(size: int) -> None:
    found = batchnorm.diagnose(trained(), batches(size))
    finding = only(found, "small-batches")
    assert finding.evidence["noise"] == pytest.approx(size**-0.5, rel=0.25)  # of independent values
    assert "ordered-batches" not in {f.check for f in found.findings}
    model = trained()
    applied(finding, model=model)
    assert type(model[1].statistics).__name__ == "Renorm"


@pytest.mark.parametrize("share", [0.4, 0.7, 1.0])
def test_batches_ordered_by_class_are_found(share: float) -> None:
    x, y = samples()
    order = torch.argsort(y + torch.rand(512, generator=torch.Generator().manual_seed(0)) * 4 * (1 - share))
    found = batchnorm.diagnose(trained(), list(zip(x[order].split(32), y[order].split(32), strict=True)))
    assert only(found, "ordered-batches").severity == "likely"
    dataset = torch.utils.data.TensorDataset(x[order], y[order])
    scope = applied(only(found, "ordered-batches"), model=trained(), dataset=dataset)
    again = batchnorm.diagnose(trained(), scope["data"])  # type: ignore[arg-type]
    assert "ordered-batches" not in {f.check for f in again.findings}


@pytest.mark.parametrize(("offset", "severity"), [(300.0, "note"), (3e3, "likely"), (1e5, "likely")])
def test_a_mean_far_above_the_deviation(offset: float, severity: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    x = torch.randn(256, 3) + offset
    finding = only(batchnorm.diagnose(model, x.split(64)), "offset")
    assert (finding.severity, finding.layer) == (severity, "0")
    assert finding.evidence["mean_over_std"] == pytest.approx(offset, rel=0.15)
    small = [part * 1e-6 for part in x.split(64)]  # far below sqrt(eps): what is lost is of outputs near 0
    assert "offset" not in {f.check for f in batchnorm.diagnose(model, small).findings}
    applied(finding, model=model)
    assert only(batchnorm.diagnose(model, x.split(64)), "offset").severity == "note"


@pytest.mark.parametrize("scale", [2e4, 1e5, 1e10])
def test_values_beyond_half_precision(scale: float) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    finding = only(batchnorm.diagnose(model, (scale * torch.randn(256, 3)).split(64)), "half-overflow")
    assert finding.severity == "note"
    applied(finding, model=model)
    assert model[0].nonfinite == "skip"


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)


def test_the_first_layer_that_is_not_finite() -> None:
    model = trained()
    model.insert(3, Log())  # of zeros, behind relu
    finding = only(batchnorm.diagnose(model, batches()), "nonfinite-output")
    assert (finding.severity, finding.layer) == ("serious", "3")
    x = torch.randn(16, 8)
    x[3, 2] = float("inf")
    model = trained()
    finding = only(batchnorm.diagnose(model, [x]), "nonfinite-output")
    assert (finding.severity, finding.layer) == ("serious", None)
    applied(finding, model=model)
    with torch.no_grad():
        model.train()(x)
    assert model[1].running_var.isfinite().all()
    assert int(model[1].skipped) == 1


@pytest.mark.parametrize("apart", [1.0, 2.0, 10.0])
def test_calls_that_receive_other_values(apart: float) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(x + apart)

    finding = only(batchnorm.diagnose(Twice().eval(), torch.randn(256, 3).split(64)), "repeated-calls")
    assert (finding.severity, finding.layer) == ("likely", "norm")
    assert finding.evidence["distance"] == pytest.approx(apart / (1 + apart**2 / 4) ** 0.5, rel=0.15)


def test_a_batch_of_one_value_per_channel() -> None:
    model = trained()
    data = [*batches(), (torch.randn(1, 8), torch.zeros(1).long())]
    assert batchnorm.diagnose(model, data).findings == ()  # of the first 512
    finding = only(batchnorm.diagnose(model, data, samples=1000), "one-value")
    assert finding.severity == "likely"
    applied(finding, model=model)
    model.train()(torch.randn(1, 8))


class Fails(nn.Module):
    """Draws random numbers of every kind, counts, and raises in the second of two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = trained()
        self.count, self.is_broken = 0, False

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        torch.rand(1), np.random.rand(), random.random()
        if self.is_broken and self.count % 2 == 0:
            raise RuntimeError("no such road")
        return self.inner(F.dropout(x, 0.5))


@pytest.mark.parametrize("is_broken", [False, True])
def test_nothing_changes_whatever_happens(is_broken: bool) -> None:
    model = Fails().train()
    model.inner[1].eval()
    model.is_broken = is_broken
    model.inner[0].weight.grad = torch.ones_like(model.inner[0].weight)
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(64, 8, requires_grad=True)
    before, kept = picture(model), x.detach().clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    data = [(part, torch.zeros(32).long()) for part in x.split(32)]
    if is_broken:
        with pytest.raises(RuntimeError, match="no such road"):
            batchnorm.diagnose(model, data)
    else:
        batchnorm.diagnose(model, data)
    assert picture(model) == before
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tobytes() == states[2]
    assert list(model._forward_hooks) == [handle.id]
    assert torch.equal(x, kept)
    assert x.grad is None
    assert torch.equal(model.inner[0].weight.grad, torch.ones_like(model.inner[0].weight))


def test_compiled_models_are_looked_through() -> None:
    model = trained()
    expected = batchnorm.diagnose(model, batches()).layers
    compiled = torch.compile(model, backend="eager")
    assert batchnorm.diagnose(compiled, batches()).layers == expected  # type: ignore[arg-type]
    model.compile(backend="eager")
    model.train()
    assert only(batchnorm.diagnose(model, batches()), "batch-mates").layer == "1"


def test_data_of_every_form() -> None:
    x, y = samples()
    expected = batchnorm.diagnose(trained(), batches()).layers
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
    assert batchnorm.diagnose(trained(), loader).layers == expected
    dicts = [{"first": part} for part in x.split(32)]
    forward = lambda model, batch: model(batch["first"])  # noqa: E731
    found = batchnorm.diagnose(trained(), dicts, forward=forward)
    assert found.layers == expected
    found = batchnorm.diagnose(trained(), iter(batches()), samples=100)
    assert found.cost.samples == 96  # whole batches
    assert batchnorm.diagnose(trained(), [x], samples=100).cost.samples == 100
    for empty in ([], [torch.randn(0, 8)]):
        with pytest.raises(DataError, match="received no sample"):
            batchnorm.diagnose(trained(), empty)
    assert checks(batchnorm.diagnose(trained(), [x[:0], x])) == set()
