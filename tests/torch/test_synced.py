"""Synchronized statistics: two and three real processes over Gloo find what one does with all of the data."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import OptionError
from tests.support.compare import as_array, assert_close
from tests.support.ranks import found_by_ranks
from tests.torch import synced_cases, synced_lost_rank, synced_rank, synced_scenarios
from tests.torch.synced_cases import CASES, CHANNELS, Case, Expected
from tests.torch.synced_rank import STEPS, batch, net, train
from tests.torch.synced_scenarios import SCENARIOS, Scenario

pytestmark = pytest.mark.xdist_group("synced")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return found_by_ranks(synced_rank, 2, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return found_by_ranks(synced_rank, 3, tmp_path_factory.mktemp("three"), 3)


def _flat(values: Tensor) -> Tensor:
    return values.movedim(1, -1).reshape(-1, CHANNELS)


def _assert_as_one(case: Case, found: list[Any], expected: Expected) -> None:
    wide = torch.promote_types(case.dtype, torch.float32)
    for rank, of_rank in enumerate(found):
        assert of_rank["y"].dtype is case.dtype
        assert_close(_flat(of_rank["y"]), expected.y[rank], dtype=case.dtype, what=f"y of rank {rank}")
        assert_close(
            _flat(of_rank["dx"]),
            expected.dx[rank],
            dtype=case.dtype,
            scale=expected.std,
            what=f"dx of {rank}",
        )
        if case.residual:
            assert_close(
                _flat(of_rank["dresidual"]), expected.dresidual[rank], dtype=case.dtype, what="dresidual"
            )
        assert_close(of_rank["running_mean"], expected.running.mean, dtype=wide, what="running_mean")
        assert_close(of_rank["running_var"], expected.running.var, dtype=wide, what="running_var")
        for name in ("running_mean", "running_var"):
            assert torch.equal(of_rank[name], found[0][name]), f"{name} differs between ranks"
        assert of_rank["batches"] == 1
    for name in ("dweight", "dbias"):  # each rank has its own share; DDP adds them up
        total = sum(as_array(of_rank[name]) for of_rank in found)
        assert_close(total, getattr(expected, name), dtype=case.parameter_dtype, what=name)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("world", [2, 3])
def test_rows_5_16_27_ranks_are_as_one(case: Case, world: int, request: pytest.FixtureRequest) -> None:
    """Rows 5, 16, 27: on CPUs, with uneven and empty batches and masks, in every layout."""
    found = request.getfixturevalue({2: "of_two", 3: "of_three"}[world])
    expected = synced_cases.expected(case, tuple(range(world)))
    _assert_as_one(case, [of_rank["cases"][case.name] for of_rank in found], expected)


def test_sub_groups(of_three: list[Any]) -> None:
    """Ranks 0 and 2 share; rank 1 is by itself."""
    found = [of_rank["sub-group"] for of_rank in of_three]
    _assert_as_one(CASES[0], [found[0], found[2]], synced_cases.expected(CASES[0], (0, 2)))
    _assert_as_one(CASES[0], [found[1]], synced_cases.expected(CASES[0], (1,)))


def _together(step: int) -> tuple[Tensor, Tensor]:
    parts = [batch(rank, step) for rank in range(2)]
    return torch.cat([x.detach() for x, _ in parts]), torch.cat([target for _, target in parts])


WAYS = ("DDP", "policy", "fused", "checkpoint", "reentrant", "FSDP2", "compiled", "saved and loaded", "lean")


@pytest.mark.parametrize("way", WAYS)
def test_rows_5_8_14_networks_train_as_in_one_process(of_two: list[Any], way: str) -> None:
    """Rows 5, 8, 14: under DDP, FSDP2, `torch.compile` and checkpointing: the same weights and statistics."""
    expected = train(net(), [_together(step) for step in range(STEPS)])
    for of_rank in of_two:
        found = of_rank["networks"][way]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_row_9_two_forwards_before_a_backward(of_two: list[Any]) -> None:
    """Row 9: the GAN pattern: no buffer that moves is part of a graph."""
    model = net()
    (first, target), (second, _) = _together(0), _together(1)
    loss = (model(first) - target).square().mean() + model(second).square().mean()
    loss.backward()
    expected = model.state_dict() | {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    for of_rank in of_two:
        for name, value in expected.items():
            torch.testing.assert_close(of_rank["two forwards"][name], value, rtol=1e-9, atol=1e-9)


def test_a_second_derivative_over_ranks(of_two: list[Any]) -> None:
    """The result of the stock layer over all of the data."""
    layer = CASES[0].layer().double()
    stock = nn.BatchNorm2d(CHANNELS).double()
    stock.load_state_dict(layer.state_dict())
    parts = [CASES[0].part(rank) for rank in range(2)]
    x = torch.cat([part.x.double() for part in parts]).requires_grad_()
    dy = torch.cat([part.dy.double() for part in parts])
    (dx,) = torch.autograd.grad(stock(x), x, dy, create_graph=True)
    dx.square().sum().backward()
    sizes = [len(part.x) for part in parts]
    for of_rank, own, second in zip(of_two, dx.split(sizes), x.grad.split(sizes), strict=True):
        torch.testing.assert_close(of_rank["penalty"]["dx"], own.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(of_rank["penalty"]["ddx"], second, rtol=1e-9, atol=1e-9)
    total = sum(of_rank["penalty"]["ddweight"] for of_rank in of_two)
    torch.testing.assert_close(total, stock.weight.grad, rtol=1e-9, atol=1e-9)


def test_row_15_one_collective_each_way(of_two: list[Any]) -> None:
    """Row 15: one packet forward, one backward; none in evaluation, nor where a rank is by itself."""
    for of_rank in of_two:
        assert {name: int(n) for name, n in of_rank["counted"].items()} == {
            "forward": 1,
            "backward": 1,
            "none": 0,
        }


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_row_5_torchs_own_scenarios_on_cpus(of_two: list[Any], scenario: Scenario) -> None:
    """Row 5: what torch tests on GPUs: the weights and statistics of one process with the whole batch."""
    expected = synced_scenarios.train(synced_scenarios.initial(scenario), *scenario.data())
    for of_rank in of_two:
        found = of_rank["scenarios"][scenario.name]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_row_5_torchs_scenarios_of_other_sizes_and_16_bits(of_two: list[Any]) -> None:
    """Row 5: ranks of 20 and 200 values; a model in float16."""
    inputs = [synced_scenarios.sizes_of(rank).movedim(1, 0).reshape(2, -1) for rank in range(2)]
    together = torch.cat(inputs, dim=1)
    for of_rank in of_two:
        running = of_rank["scenarios"]["Diff_Input_Sizes_Running_Value"]
        torch.testing.assert_close(running["mean"], together.mean(1))
        torch.testing.assert_close(running["var"], together.var(1))
        half = of_rank["scenarios"]["half"]
        assert half["y"].dtype == half["gradient"].dtype == torch.float16
        assert half["gradient"].isfinite().all()


@pytest.mark.parametrize("how", ["skips", "killed", pytest.param("asleep", marks=pytest.mark.slow)])
def test_row_16_a_rank_that_does_not_come_is_found_out(how: str, tmp_path: Path) -> None:
    """Row 16: an error in time that names the layer and the rank; nothing has moved."""
    lost = {1} if how == "killed" else set()
    first, second = found_by_ranks(synced_lost_rank, 2, tmp_path, how, lost=lost)
    assert first["error"].startswith("RankError: first (BatchNorm1d) forward"), first
    assert "rank 1" in first["error"]
    assert first["unchanged"]
    assert first["seconds"] < synced_lost_rank.TIMEOUT / 2
    if how == "skips":
        assert "second (BatchNorm1d) forward" in first["error"]
        assert second["error"].startswith("RankError: second (BatchNorm1d) forward")
        assert "rank 0 sent something else, 'first (BatchNorm1d) forward" in second["error"]
        assert second["unchanged"]


def test_ctrl_c_reaches_a_rank_that_waits(tmp_path: Path) -> None:
    """Long before the timeout; and the other rank learns of it when it comes."""
    first, second = found_by_ranks(synced_lost_rank, 2, tmp_path, "interrupted")
    assert first["error"].startswith("KeyboardInterrupt")
    assert first["seconds"] < synced_lost_rank.TIMEOUT / 2
    assert second["error"].startswith("RankError: first (BatchNorm1d) forward")
    assert first["unchanged"]
    assert second["unchanged"]


def test_the_backward_of_one_call_never_pairs_with_that_of_another(tmp_path: Path) -> None:
    """A layer is called twice, and a rank runs one backward only: the last calls' begin first elsewhere."""
    for found in found_by_ranks(synced_lost_rank, 2, tmp_path, "half a backward"):
        assert found["error"].startswith("RankError: first (BatchNorm1d) backward"), found
        assert found["seconds"] < synced_lost_rank.TIMEOUT / 2
        assert re.search(
            r"sent something else, 'first \(BatchNorm1d\) backward.* of call [34]", found["error"]
        )


@pytest.mark.parametrize("way", ["eager", "compiled", "twice differentiable"])
def test_a_backward_without_the_ranks_of_its_forward_is_refused(of_two: list[Any], way: str) -> None:
    """The process group was destroyed between them: sums of one rank alone are another gradient."""
    for of_rank in of_two:
        error = of_rank["destroyed"][way]
        assert "SyncBatchNorm" in error.partition(":")[0]
        assert (
            "shared statistics with 2 ranks, and its backward finds 1: call backward() before destroy"
            in error
        )


def test_without_processes_it_is_the_plain_layer() -> None:
    for case in CASES:
        if case.samples[0] > 1:
            found = synced_rank.run(case, 0)
            _assert_as_one(case, [found], synced_cases.expected(case, (0,)))


def test_a_torch_that_was_built_without_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no other function there."""
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    x, layer, other = torch.randn(6, 4, 3), batchnorm.SyncBatchNorm(4), batchnorm.BatchNorm1d(4)
    assert torch.equal(layer(x), other(x))
    with pytest.raises(OptionError, match=r"torch\.distributed is not initialized"):
        batchnorm.SyncBatchNorm(4, process_group=object())


def test_it_is_no_stock_synchronized_layer_and_has_its_signature() -> None:
    """DDP refuses subclasses of the stock class on a CPU."""
    layer = batchnorm.SyncBatchNorm(3, 1e-3, None, True, True, None, "cpu", torch.float64)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert layer.weight.dtype == torch.float64
    assert layer.state_dict().keys() == nn.SyncBatchNorm(3).state_dict().keys()
    assert layer(torch.randn(5, 3, dtype=torch.float64)).shape == (5, 3)
    assert layer(torch.randn(5, 3, 2, 2, 2, 2, dtype=torch.float64)).shape == (5, 3, 2, 2, 2, 2)
    with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
        layer(torch.randn(3, dtype=torch.float64))
    again = pickle.loads(pickle.dumps(layer))
    assert again.statistics == layer.statistics == batchnorm.Synced()
    assert "statistics=Synced(group=None" in repr(batchnorm.SyncBatchNorm(3))
