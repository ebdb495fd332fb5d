"""The benchmark of `lean`: variants are the same network, bytes are those held, goals are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import goals, lean, lean_page
from benchmarks.lean_variants import VARIANTS, LeanCase

pytestmark = pytest.mark.xdist_group("benchmark of lean")  # a row takes seconds to measure

CASE = LeanCase("MobileNetV2", 8, 32)  # of fewer values a norm makes too much of rounding


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean, "TIMES", 1)
        return lean.measured(CASE, rounds=1, apart=lambda function, *arguments: function(*arguments))


def test_every_variant_is_the_same_network() -> None:
    losses = {name: build(CASE).forward().item() for name, build in VARIANTS.items()}
    assert losses["lean"] == losses["ours"]
    assert losses["checkpoint"] == losses["selective"] == losses["stock"]
    assert losses["ours"] == pytest.approx(losses["stock"], rel=1e-3)


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc"
)
def test_a_row_has_every_figure(row: dict[str, Any]) -> None:
    for what in ("bytes_held", "bytes_allocated", "seconds"):
        assert row[what].keys() == VARIANTS.keys()
    allocated = row["bytes_allocated"]
    assert allocated["lean"] < 0.55 * allocated["stock"]
    assert allocated["checkpoint"] < allocated["lean"]
    assert row["gradients_identical"]
    assert "MobileNetV2" in lean_page.lean_table([row])


def test_allocated_bytes_are_those_of_the_tensors() -> None:
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    step = VARIANTS["stock"](CASE)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.forward()
    expected = sum(size for place, size in kept.items() if place not in parameters)
    del loss
    found = lean.bytes_held(CASE, "stock")["allocated"]
    assert found == pytest.approx(expected, rel=0.05)


def test_goals_are_compared_with_what_was_found(row: dict[str, Any]) -> None:
    found = goals.lean_findings([row, row | {"gradients_identical": False}])
    assert [finding.reached for finding in found if "gradients" in finding.what] == [False]
    worse = row | {"bytes_held": {"lean": 0.56, "stock": 1.0}}
    reached = [f.reached for f in goals.lean_findings([worse, row]) if "bytes held" in f.what]
    assert reached[0] is False
    assert "**missed**" in lean_page.goals_table([worse])


def test_the_picture_is_the_same_for_the_same_rows(row: dict[str, Any]) -> None:
    rows = [row, row | {"network": "another"}]
    assert lean_page.picture(rows) == lean_page.picture(rows)
