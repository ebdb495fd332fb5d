"""Small networks and their steps: the same network with each norm, every figure, goals of the right rows."""

from __future__ import annotations

import copy
import os
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm
from benchmarks import first_call, goals, small_steps
from benchmarks.handwritten import BatchRenorm1d, GhostBatchNorm1d
from benchmarks.small_steps import NETWORKS

NORMS = {
    "MLP": 1,
    "deep": 8,
    "critic": 2,
    "conv net": 3,
    "TabNet, Ghost(128)": 20,
    "actor–critic, Renorm()": 9,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_form_is_the_same_network(name: str) -> None:
    steps = small_steps.training_steps(NETWORKS[name])
    assert ("fused" in steps) == NETWORKS[name].fuses
    before = torch.get_rng_state()
    losses = {form: [step() for _ in range(2)] for form, step in steps.items()}
    assert torch.equal(torch.get_rng_state(), before)
    for form in steps.keys() - {"stock", "no norm"}:
        assert losses[form] == pytest.approx(losses["stock"], rel=1e-5)
    assert losses["no norm"][0] != pytest.approx(losses["stock"][0], rel=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_form_has_the_norms_that_it_says(name: str) -> None:
    models: list[nn.Module] = []

    def train(model: nn.Module, batch: int) -> small_steps.Step:  # noqa: ARG001
        models.append(model)
        return lambda: 0.0

    network = NETWORKS[name]
    forms = small_steps.training_steps(replace(network, train=train))
    for form, model in zip(forms, models, strict=True):
        kinds = (nn.modules.batchnorm._BatchNorm, GhostBatchNorm1d, BatchRenorm1d)
        norms = [one for one in model.modules() if isinstance(one, kinds) and not hasattr(one, "bn")]
        ours = [one for one in norms if isinstance(one, batchnorm.BatchNorm1d | batchnorm.BatchNorm2d)]
        assert len(norms) == (0 if form == "no norm" else NORMS[name])
        assert len(ours) == (NORMS[name] if form in ("drop-in", "fused", "unchecked") else 0)
        assert [one for one in ours if one.activation is None] == (
            ours if form in ("drop-in", "unchecked") else []
        )


HANDWRITTEN = {
    "ghost": (GhostBatchNorm1d(5, 4), {"statistics": batchnorm.Ghost(4, sequential=True), "momentum": 0.01}),
    "renorm": (
        BatchRenorm1d(5),
        {"statistics": batchnorm.Renorm(r_steps=(0, 0), d_steps=(0, 0)), "momentum": 0.01, "eps": 1e-3},
    ),
}


@pytest.mark.parametrize("kind", HANDWRITTEN)
def test_what_is_written_by_hand_computes_what_ours_does(kind: str) -> None:
    torch.manual_seed(0)
    by_hand, options = HANDWRITTEN[kind]
    ours = batchnorm.BatchNorm1d(5, **options).double()
    by_hand = copy.deepcopy(by_hand).double()
    weight, bias = torch.randn(2, 5, dtype=torch.float64)
    affine = [(layer.weight, layer.bias) for layer in (ours, getattr(by_hand, "bn", by_hand))]
    for a, b in affine:
        a.data.copy_(weight)
        b.data.copy_(bias)

    def assert_same(x: torch.Tensor, dy: torch.Tensor) -> None:
        found = []
        for layer, parameters in zip((ours, by_hand), affine, strict=True):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            found.append((y, *torch.autograd.grad(y, (leaf, *parameters), dy)))
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)

    for _ in range(3):  # the running statistics move, and renormalization follows them
        x, dy = torch.randn(2, 12, 5, dtype=torch.float64) * 2 + 1
        assert_same(x, dy)
        if kind == "renorm":  # by hand the running variance takes the biased one, of 12 values: 1 / 12 less
            biased = ours.running_var - 0.01 * x.var(0) / 12
            torch.testing.assert_close(by_hand.running_mean, ours.running_mean, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(by_hand.running_var, biased, rtol=1e-9, atol=1e-9)
            by_hand.running_var.copy_(ours.running_var)
    ours.eval()
    by_hand.eval()
    assert_same(*torch.randn(2, 4, 5, dtype=torch.float64))


def test_a_row_has_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    row = small_steps.measured("critic", 1, quick=True)
    assert torch.get_num_threads() == threads
    assert row["seconds"].keys() == {"stock", "drop-in", "fused", "unchecked", "no norm"}
    assert row["ratios"].keys() == {
        f"stock / {form}" for form in ("drop-in", "fused", "unchecked", "no norm")
    }
    assert "| critic | 256 | 1 |" in small_steps.small_step_table([row])
    assert "one thread: stock ÷ fused | ≥ 1 |" in small_steps.goals_table([row])

    def other(model: nn.Module, batch: int) -> small_steps.Step:  # noqa: ARG001
        return lambda: float(not isinstance(model[1], batchnorm.BatchNorm1d)) + 1.0

    monkeypatch.setitem(NETWORKS, "critic", replace(NETWORKS["critic"], train=other))
    with pytest.raises(RuntimeError, match="not the same network"):
        small_steps.measured("critic", 1, quick=True)
    assert torch.get_num_threads() == threads


def step_row(network: str, **fields: Any) -> dict[str, Any]:
    return {"network": network, "ratios": {}} | fields


def test_goals_of_steps_are_of_the_right_rows() -> None:
    ratios = {"stock / drop-in": {"median": 0.96}, "stock / fused": {"median": 0.98}}
    rows = [step_row("deep", threads=threads, ratios=ratios) for threads in (1, 2)]
    found = {finding.what: finding for finding in goals.small_step_findings(rows)}
    drop_in, fused = (found[f"deep, one thread: stock ÷ {form}"] for form in ("drop-in", "fused"))
    assert (drop_in.found, drop_in.number, drop_in.below, drop_in.reached) == (
        pytest.approx(0.96),
        1,
        1,
        False,
    )
    assert (fused.below, fused.reached) == (0, True)  # at 0.97 of a goal a row meets it
    assert found["critic, one thread: stock ÷ fused"].number == 0
    large = [
        step_row("ResNet-50", layout=layout, ratios={"stock / ours": {"median": ratio}})
        for layout, ratio in (("contiguous", 1.01), ("channels-last", 1.01))
    ]
    reached = {finding.what: finding.reached for finding in goals.step_findings(large) if finding.number}
    assert reached == {
        "ResNet-50, contiguous: stock ÷ ours": False,
        "ResNet-50, channels-last: stock ÷ ours": True,
    }


def test_the_first_call_is_that_of_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    found = first_call._fresh_process("ours")
    assert found["total"] == pytest.approx(found["import"] + found["call"])
    assert found["import"] > 1e-3  # the layer is not there before
    assert first_call._fresh_process("stock")["import"] < 1e-3

    def process(name: str) -> dict[str, float]:
        return {"import": 0.1, "call": 0.8, "total": 0.9} if name == "ours" else dict.fromkeys(found, 0.2)

    monkeypatch.setattr(first_call, "_fresh_process", process)
    rows = first_call.measure()
    assert "| ours | 100.0 | 800.0 | 900.0 | 900.0 |" in first_call.first_call_table(rows)
    assert "**missed**" in first_call.goals_table(rows)
    rows[0]["seconds"]["ours"]["total"] = 0.81
    assert "| reached |" in first_call.goals_table(rows)
