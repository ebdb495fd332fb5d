"""`diagnose` without data: planted faults are found by name, healthy models have none, nothing changes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import ArgumentTypeError, OptionError

from .diagnosed import applied, batches, checks, network, only, samples, trained

Plant = Callable[[nn.Sequential], None]


def _fill(name: str, value: float, count: int) -> Plant:
    def plant(model: nn.Sequential) -> None:
        with torch.no_grad():
            getattr(model[4], name)[:count] = value

    return plant


def _initial(model: nn.Sequential) -> None:
    model[4].reset_running_stats()


def _updates(count: int) -> Plant:
    """So few batches that the initial values are still in the statistics."""

    def plant(model: nn.Sequential) -> None:
        model[4].reset_running_stats()
        model.train()
        for x, _ in (2 * batches())[:count]:
            model(x)
        model.eval()

    return plant


def _set(**values: object) -> Plant:
    def plant(model: nn.Sequential) -> None:
        for name, value in values.items():
            setattr(model[4], name, value)

    return plant


NAN, S = math.nan, "serious"
STATE = [
    *[(f"NaN in {n}", _fill("running_mean", NAN, n), S, "nonfinite-statistics") for n in (1, 8, 16)],
    *[(f"inf in {n}", _fill("running_var", math.inf, n), S, "nonfinite-statistics") for n in (1, 16)],
    *[(f"negative {v}", _fill("running_var", v, 1), S, "negative-variance") for v in (-1e-9, -1.0, -1e6)],
    *[(f"huge {v}", _fill("running_var", v, 1), "likely", "huge-variance") for v in (1e13, 1e20, 1e30)],
    *[(f"zero in {n}", _fill("running_var", 0.0, n), s, "zero-variance")
      for n, s in ((1, "note"), (8, "note"), (16, "likely"))],
    *[(f"weight {v}", _fill("weight", v, 1), S, "nonfinite-parameters") for v in (NAN, math.inf)],
    ("bias NaN", _fill("bias", float("nan"), 1), "serious", "nonfinite-parameters"),
    *[(f"{n} dead", _fill("weight", v, n), s, "dead-channels")
      for n, v, s in ((1, 0.0, "note"), (1, 1e-6, "note"), (8, 0.0, "likely"), (16, 0.0, "likely"))],
    ("never updated", _initial, "serious", "never-updated"),
    *[(f"{n} updates", _updates(n), s, "prior") for n, s in ((2, "likely"), (8, "likely"), (24, "note"))],
    *[(f"momentum {m}", _set(momentum=m), s, "momentum")
      for m, s in ((0.5, "likely"), (0.9, "serious"), (0.997, "serious"))],
]  # fmt: skip


@pytest.mark.parametrize(
    ("plant", "severity", "check"), [row[1:] for row in STATE], ids=[row[0] for row in STATE]
)
def test_faults_of_a_state_are_found(plant: Plant, severity: str, check: str) -> None:
    """Row 36 among them: initial statistics beside trained weights. Row 62: dead channels."""
    model = trained()
    assert batchnorm.diagnose(model).findings == ()
    plant(model)
    if check == "momentum":
        model[4].num_batches_tracked += 100
    found = batchnorm.diagnose(model)
    assert (severity, check, "4") in checks(found), found
    assert {finding.layer for finding in found.findings} == {"4"}
    assert found.is_serious == (severity == "serious")
    assert only(found, check).short in batchnorm.inspect(model).rows[1].health
    applied(only(found, check), model=model, data=[x for x, _ in batches()])
    if check != "dead-channels":  # those stay, in a copy without norms
        data = batches() if check == "prior" else None  # that its statistics are the data's, the data shows
        assert check not in {of.check for of in batchnorm.diagnose(model, data).findings}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_in_half_precision_are_found_and_mended(dtype: torch.dtype) -> None:
    model = trained().to(dtype)
    finding = only(batchnorm.diagnose(model), "half-statistics")
    applied(finding, model=model)
    assert model[1].running_var.dtype == torch.float32
    assert "half-statistics" not in {f.check for f in batchnorm.diagnose(model).findings}


def test_initial_statistics_of_an_untrained_model_are_a_note() -> None:
    found = batchnorm.diagnose(network().eval())
    assert checks(found) == {("note", "never-updated", "1"), ("note", "never-updated", "4")}
    model = network().eval()
    model[1].weight.data.uniform_(0.5, 1.5)  # as some networks begin
    assert {f.severity for f in batchnorm.diagnose(model).findings} == {"note"}
    model[1].bias.data.normal_()  # as none does
    assert {f.severity for f in batchnorm.diagnose(model).findings} == {"serious"}


def test_frozen_parameters_whose_statistics_move() -> None:
    """Row 37: the base of an adapter is frozen, and its statistics move."""
    model = trained()
    for parameter in model[:6].parameters():
        parameter.requires_grad = False
    assert checks(batchnorm.diagnose(model)) == {
        ("likely", "frozen-parameters", "1"),
        ("likely", "frozen-parameters", "4"),
    }
    model.train()
    found = batchnorm.diagnose(model)
    assert ("serious", "frozen-parameters", "1") in checks(found)
    for finding in found.findings:
        if finding.check == "frozen-parameters":
            applied(finding, model=model)
    before = model[1].running_mean.clone()
    model.train()(samples()[0])
    assert torch.equal(model[1].running_mean, before)
    assert "frozen-parameters" not in {f.check for f in batchnorm.diagnose(model).findings}
    for parameter in model.parameters():  # of inference: nothing is trained
        parameter.requires_grad = False
    assert batchnorm.diagnose(model.eval()).findings == ()


def test_modes_that_differ() -> None:
    """Row 53: flags that freeze some norms, until the next train()."""
    model = trained()
    model[4].train()
    finding = only(batchnorm.diagnose(model), "mixed-modes")
    assert (finding.severity, finding.layer) == ("serious", "4")
    applied(finding, model=model)
    assert batchnorm.diagnose(model).findings == ()
    model.train()
    model[1].eval()
    finding = only(batchnorm.diagnose(model), "mixed-modes")
    assert (finding.severity, finding.layer) == ("likely", "1")
    applied(finding, model=model)
    assert "mixed-modes" not in {f.check for f in batchnorm.diagnose(model.train()).findings}


def test_frozen_statistics_under_learning_weights() -> None:
    model = batchnorm.freeze(trained())
    assert checks(batchnorm.diagnose(model)) == {
        ("note", "frozen-statistics", "1"),
        ("note", "frozen-statistics", "4"),
    }
    assert batchnorm.diagnose(batchnorm.freeze(trained(), parameters=True)).findings == ()


def test_a_bias_that_a_norm_removes_goes_without_a_change() -> None:
    """Row 60."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    x = torch.randn(8, 3, 6, 6)
    batchnorm.calibrate(model, [x])
    found = batchnorm.diagnose(model.eval())
    assert [(f.layer, f.evidence["before"]) for f in found.findings if f.check == "bias-before"] == [
        ("1", "0"),
        ("4", "3"),
    ]
    with torch.no_grad():
        before = model(x), model.train()(x)
        model.eval()
        for finding in found.findings:
            if finding.check == "bias-before":
                applied(finding, model=model)
        after = model(x)
        assert model[0].bias is None
        torch.testing.assert_close(after, before[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.train()(x), before[1], rtol=1e-4, atol=1e-5)
    assert "bias-before" not in {f.check for f in batchnorm.diagnose(model.eval()).findings}
    shared = nn.Linear(4, 4)
    twice = nn.Sequential(shared, nn.BatchNorm1d(4), shared, nn.ReLU())
    assert "bias-before" not in {f.check for f in batchnorm.diagnose(twice.eval()).findings}


@pytest.mark.parametrize(("rate", "severity"), [(0.1, "note"), (0.2, "likely"), (0.5, "likely")])
def test_dropout_right_before_a_norm(rate: float, severity: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Dropout(rate), nn.BatchNorm1d(4)).eval()
    for example in (None, torch.randn(3, 4)):
        finding = only(batchnorm.diagnose(model, example=example), "dropout-before")
        assert (finding.severity, finding.layer, finding.evidence["rate"]) == (severity, "2", rate)
    without = nn.Sequential(nn.Dropout(rate), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)).eval()
    assert "dropout-before" not in {f.check for f in batchnorm.diagnose(without).findings}


def test_calls_of_one_norm_and_one_value_per_sample() -> None:
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), norm, nn.ReLU(), norm).eval()
    found = batchnorm.diagnose(model, example=torch.randn(3, 4))
    finding = only(found, "repeated-calls")
    assert finding.evidence["calls"] == 2
    assert only(found, "one-value").layer == "1"
    applied(finding, model=model)
    assert model[1].domains == 2
    small = nn.Sequential(nn.BatchNorm1d(4)).eval()
    applied(only(batchnorm.diagnose(small, example=torch.randn(2, 4)), "one-value"), model=small)
    assert small.train()(torch.randn(1, 4)).shape == (1, 4)


@pytest.mark.parametrize(("decay", "severity"), [(1e-5, "note"), (5e-4, "note"), (1e-2, "likely")])
def test_weight_decay_is_taken_off(decay: float, severity: str) -> None:
    """Row 57."""
    model = trained()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=decay)
    finding = only(batchnorm.diagnose(model, optimizer=optimizer), "weight-decay")
    assert (finding.severity, finding.evidence["norms"]) == (severity, 2)
    applied(finding, model=model, optimizer=optimizer)
    assert batchnorm.diagnose(model, optimizer=optimizer).findings == ()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len({id(p) for p in held})
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(4, decay), (4, 0.0)]


def test_plain_and_synchronized_norms() -> None:
    model = trained()
    batchnorm.convert(model[4], batchnorm.Synced())
    finding = only(batchnorm.diagnose(model), "mixed-synchronization")
    assert (finding.severity, finding.layer) == ("likely", None)
    applied(finding, model=model)
    assert batchnorm.diagnose(model).findings == ()


def test_a_norm_without_running_statistics_gets_some() -> None:
    """Row 52."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    finding = only(batchnorm.diagnose(model), "untracked")
    assert (finding.severity, finding.layer) == ("likely", "1")
    data = [x for x, _ in batches()]
    applied(finding, model=model, data=data)
    whole = torch.cat(data)
    with torch.no_grad():
        torch.testing.assert_close(model[1].running_mean, model[0](whole).mean(0))
        torch.testing.assert_close(model(whole[:3]), model(whole)[:3])
    assert batchnorm.diagnose(model).findings == ()


@pytest.mark.parametrize("training", [True, False])
def test_exported_graphs_fixed_in_training(training: bool) -> None:
    """Row 45: an exported module cannot be switched, but by its graph."""
    model, (x, _) = trained(), samples(4)
    with torch.no_grad():
        expected = model(x)
    graph = torch.export.export(model.train(training), (x,)).module()
    found = batchnorm.diagnose(graph)
    assert ("training-graph" in {f.check for f in found.findings}) == training
    if training:
        finding = only(found, "training-graph")
        assert (finding.severity, finding.layer) == ("serious", None)
        applied(finding, model=graph)
        with torch.no_grad():
            torch.testing.assert_close(graph(x), expected)
        assert batchnorm.diagnose(graph).findings == ()


def test_training_mode_is_said_before_an_export() -> None:
    """Row 51."""
    model = trained().train()
    finding = only(batchnorm.diagnose(model), "training-mode")
    assert finding.severity == "note"
    applied(finding, model=model)
    assert batchnorm.diagnose(model).findings == ()


def test_findings_can_be_ignored() -> None:
    model = network().eval()
    assert checks(batchnorm.diagnose(model, ignore=["never-updated:1"])) == {("note", "never-updated", "4")}
    assert batchnorm.diagnose(model, ignore=["never-updated"]).findings == ()
    with pytest.raises(OptionError, match="there is no check 'bias'"):
        batchnorm.diagnose(model, ignore=["bias"])


def test_what_is_no_model_or_option_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="diagnose takes a model"):
        batchnorm.diagnose({})
    with pytest.raises(OptionError, match="samples is a number of 2"):
        batchnorm.diagnose(network(), samples=1)
    with pytest.raises(ArgumentTypeError, match=r"optimizer is one of torch\.optim; got a str"):
        batchnorm.diagnose(network(), optimizer="adam")
    with pytest.raises(OptionError, match="not initialized: run it once"):
        batchnorm.diagnose(nn.Sequential(nn.LazyBatchNorm1d()), [torch.randn(4, 3)])
    assert checks(batchnorm.diagnose(nn.Sequential(nn.LazyBatchNorm1d()).eval())) == {
        ("note", "unreadable", "0")
    }
    with torch.device("meta"):
        assert checks(batchnorm.diagnose(nn.BatchNorm1d(3).eval())) == {("note", "unreadable", "")}
    assert batchnorm.diagnose(nn.Linear(2, 2)).findings == ()


def test_a_diagnosis_is_shown_in_every_form() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.add_module("<b>\x1b[2J", nn.BatchNorm1d(3))
    model.eval()[1].running_var[0] = float("nan")
    found = batchnorm.diagnose(model)
    text, html, plain = str(found), found._repr_html_(), json.loads(found.to_json())
    assert "serious: nonfinite-statistics" in text
    assert "\x1b" not in text
    assert "<b>" not in html
    assert "nonfinite-statistics" in html
    assert plain["is_serious"] is True
    assert plain["findings"][0]["page"] == "docs/doctor.md#nonfinite-statistics"
    assert plain["findings"][0]["remedy"] == "batchnorm.calibrate(model, data)"
