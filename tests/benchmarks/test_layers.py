"""The measurements of layers and steps: they run, and their summary is what it says."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import batchnorm
from benchmarks import goals, layer_page, layer_rivals, networks
from benchmarks.interleaved import clocked, interleave, ratio
from benchmarks.layer_cases import (
    EVALUATION,
    FORWARD_AND_BACKWARD,
    INFERENCE,
    Case,
    cases,
    reuse_memory_cases,
)
from benchmarks.layer_time import row
from benchmarks.stock import StockChain


def measured(case: Case) -> dict[str, Any]:
    steps = {name: clocked(step) for name, step in layer_rivals.steps(case).items()}
    return row(case, interleave(steps, 3, warm_up=1), {"": "copy"})


@pytest.mark.parametrize("operation", [*FORWARD_AND_BACKWARD, *EVALUATION, *INFERENCE])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_a_row_has_every_figure(operation: str, layout: str) -> None:
    case = Case(operation, (3, 4, 5, 6), layout, rivals=("stock", "stock-in-place", "ours"))
    found = measured(case)
    assert found["rivals"].keys() == {"stock", "stock-in-place", "ours"}
    assert found["ratios"].keys() == {"stock / ours", "stock-in-place / ours"}
    ours = found["rivals"]["ours"]
    passes = (2 if case.evaluation else 5 if layout == "contiguous" else 8) + 2 * case.residual
    assert found["bytes_moved"] == passes * 360 * 4
    assert ours["over_floor"] == pytest.approx(ours["seconds"] / (passes * found["copy_seconds"]["copy"] / 2))
    assert "norm" in layer_page.layer_table([found])


def test_rivals_take_turns_and_each_follows_each() -> None:
    order: list[str] = []
    steps = {name: clocked(lambda name=name: order.append(name)) for name in "abc"}  # type: ignore[misc]
    times = interleave(steps, 6, warm_up=0)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 6, "b": 6, "c": 6}
    assert {pair for pair in itertools.pairwise(order) if pair[0] != pair[1]} == {
        (one, other) for one in "abc" for other in "abc" if one != other
    }
    assert ratio([2.0, 6.0, 8.0], [1.0, 2.0, 2.0])["median"] == 3.0


def rows_of(ratios: dict[tuple[int, ...], float], **fields: Any) -> list[dict[str, Any]]:
    return [
        {
            "operation": "norm-relu",
            "dtype": "float32",
            "layout": "contiguous",
            "shape": list(shape),
            "values": math.prod(shape),
            "tensor_bytes": 4 * math.prod(shape),
            "ratios": {"stock / ours": {"median": found}},
            "rivals": {"ours": {"over_floor": 1.0}},
            **fields,
        }
        for shape, found in ratios.items()
    ]


def test_goals_are_geometric_means_and_misses_are_said() -> None:
    rows = rows_of({(32, 64, 56, 56): 8.0, (32, 256, 14, 14): 2.0, (2, 2, 2, 2): 0.1})
    large, least = goals.layer_findings(rows)
    assert (large.found, large.worst, large.number, large.reached) == (pytest.approx(4.0), 2.0, 2, True)
    assert (least.found, least.reached) == (2.0, True)
    rows += rows_of({(64, 64, 56, 56): 0.5})
    large, least = goals.layer_findings(rows)
    assert (large.found, large.reached) == (pytest.approx(2.0), False)
    assert (least.found, least.reached) == (0.5, False)
    assert layer_page.goals_table(rows).count("**missed**") == 2


def test_each_row_has_its_goal() -> None:
    def found(*rows: dict[str, Any]) -> dict[str, goals.Finding]:
        return {finding.what: finding for finding in goals.layer_row_findings([*rows])}

    def row_at(ratio: float, stock: float = 9.0, ours: float = 9.0, **fields: Any) -> dict[str, Any]:
        floors = {"stock": {"over_floor": stock}, "ours": {"over_floor": ours}}
        return rows_of({(32, 64): ratio}, rivals=floors, layout="channels-last", **fields)[0]

    training, tiny = "training: stock ÷ ours", "norm → ReLU, float32, (32, 64), training: stock ÷ ours"
    three = found(row_at(2.0), row_at(0.98, dtype="bfloat16"), row_at(0.5, operation="norm"))
    assert (three[training].number, three[training].below, three[training].reached) == (3, 1, False)
    assert (three[training].found, three[training].worst) == (pytest.approx(0.98 ** (1 / 3)), 0.5)
    assert three[training].worst_row == "norm, float32, (32, 64), channels-last"
    assert (three[tiny].number, three[tiny].reached) == (1, True)
    assert not found(row_at(1.05))[tiny].reached  # of 1.1
    assert found(row_at(0.9, stock=1.15, ours=1.1))[training].reached  # near the floor
    assert not found(row_at(0.9, stock=1.15, ours=1.11))[training].reached
    assert not found(row_at(0.9, stock=1.16, ours=1.1))[training].reached
    forwards = found(row_at(0.9, operation="eval-norm"), row_at(1.0, operation="infer-norm-relu"))
    assert (forwards["evaluation: stock ÷ ours"].below, forwards["inference mode: stock ÷ ours"].below) == (
        1,
        0,
    )
    assert forwards[training].number == 0
    large = rows_of({(32, 64, 56, 56): 1.6, (64, 64, 56, 56): 2.5}, rivals={"stock": {"over_floor": 9.0}})
    means = goals.layer_row_findings(large + [row | {"layout": "channels-last"} for row in large])
    below = {finding.asked: (finding.below, finding.reached) for finding in means if finding.number == 2}
    assert below == {"mean ≥ 3.2": (2, False), "mean ≥ 1.8": (1, True)}
    assert "| 2 | 1 | reached |" in layer_page.row_goals_table(
        large + [row | {"layout": "channels-last"} for row in large]
    )


def test_forwards_run_in_their_mode() -> None:
    modes = []
    for operation in ("eval-norm", "infer-norm"):
        case = Case(operation, (3, 4), "channels-last")
        chain = StockChain(2, 4)
        chain.register_forward_hook(
            lambda *_: modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        )
        layer_rivals._torch_step(chain, case, layer_rivals.tensors(case))()
    assert modes == [(False, False), (False, True)]


def test_every_case_is_of_a_named_network_and_measured_once() -> None:
    for found in (cases(), reuse_memory_cases()):
        assert all(case.network for case in found)
        assert len(set(found)) == len(found)


# As torchvision gives them.
PARAMETERS = {
    "ResNet-18": 11_689_512,
    "ResNet-50": 25_557_032,
    "MobileNetV2": 3_504_872,
    "DenseNet-121": 7_978_856,
    "VGG-11-BN": 132_868_840,
    "EfficientNet-B0": 5_288_548,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_have_as_many_parameters_as_those_of_their_name(name: str) -> None:
    with torch.device("meta"):
        network = networks.NETWORKS[name](networks.ours)
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


# VGG is a row of layers, and takes seconds to be filled with 132 million random numbers.
@pytest.mark.parametrize("name", [name for name in networks.NETWORKS if name != "VGG-11-BN"])
def test_networks_compute_the_same_with_each_norm(name: str) -> None:
    build = networks.NETWORKS[name]
    torch.manual_seed(0)
    stock, ours = build(networks.stock).double(), build(networks.ours).double()
    with torch.no_grad():
        for one, other in zip(stock.parameters(), ours.parameters(), strict=True):
            other.copy_(one)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-6, atol=1e-7)


def test_fuse_takes_every_activation_of_a_resnet_with_its_addition() -> None:
    network = batchnorm.fuse(batchnorm.convert(networks.resnet18(networks.stock)))
    assert sum(getattr(module, "activation", None) == "relu" for module in network.modules()) == 17


def test_losses_are_those_below_one_the_worst_first() -> None:
    rows = rows_of(
        {(32, 64, 56, 56): 2.0, (32, 512, 7, 7): 0.9, (32, 64, 8, 8): 0.5},
        network="any",
        rivals={name: {"seconds": 0.002} for name in ("stock", "ours")},
    )
    for row_ in rows:
        row_["ratios"]["stock / ours"]["quartiles"] = [0.1, 3.0]
    lines = layer_page.losses_table(rows).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["(32, 64, 8, 8)", "(32, 512, 7, 7)"]
    assert layer_page.losses_table(rows[:1]) == ""
