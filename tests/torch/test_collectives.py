"""Numbers between real processes over Gloo: what arrives, and how one that is missing or astray is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm.torch.collectives.operations import (
    Ranks,
    add,
    differentiable_add,
    differentiable_gather,
    gather,
    members,
)
from tests.support.ranks import found_by_ranks
from tests.torch import collectives_rank
from tests.torch.collectives_rank import PATIENCE, SHAPES, loss_of, packet_of, table_of

RANKS = range(3)
# How far two orders of adding three numbers are apart, and more: sums of float64 of the size of 1.
ROUNDING = 1e-14

pytestmark = pytest.mark.xdist_group("collectives")


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The results of three ranks for all that must work."""
    return found_by_ranks(collectives_rank, 3, tmp_path_factory.mktemp("works"), 3, "works")


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The errors of three ranks for all that must fail."""
    return found_by_ranks(collectives_rank, 3, tmp_path_factory.mktemp("fails"), 3, "fails")


def assert_shared(found: list[Any], name: str, packets: list[np.ndarray]) -> None:
    """Every rank has all packets in order, and their sum, the same bits."""
    for of_rank in found:
        gathered, total = of_rank[name]
        np.testing.assert_array_equal(gathered.numpy(), np.stack(packets))
        np.testing.assert_allclose(total.numpy(), np.stack(packets).sum(0), rtol=0, atol=ROUNDING)
        assert torch.equal(total, found[0][name][1])


def _pairs(found: list[Any], shape: tuple[int, ...]) -> list[Any]:
    return [{"found": (of_rank[f"gather {shape}"], of_rank[f"add {shape}"])} for of_rank in found]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_ranks_have_the_same_bits_of_all_packets(worked: list[Any], shape: tuple[int, ...]) -> None:
    assert_shared(_pairs(worked, shape), "found", [packet_of(rank, shape).numpy() for rank in RANKS])


def test_two_ranks_have_the_same_bits_of_all_packets(tmp_path: Path) -> None:
    found = found_by_ranks(collectives_rank, 2, tmp_path, 2, "works")
    for shape in SHAPES:
        assert_shared(_pairs(found, shape), "found", [packet_of(rank, shape).numpy() for rank in range(2)])
    assert [of_rank["connections left"] for of_rank in found] == [0, 0]  # of a group that was destroyed


def test_strided_and_narrow_packets_and_inference_mode(worked: list[Any]) -> None:
    assert_shared(worked, "strided", [packet_of(rank, (4, 6)).numpy().T[::2] for rank in RANKS])
    assert_shared(worked, "narrow", [np.full(3, rank + 0.5, np.float32) for rank in RANKS])
    assert_shared(worked, "inference", [packet_of(rank, (5,)).numpy() for rank in RANKS])
    assert worked[0]["narrow"][0].dtype == torch.float32


def test_another_backend_carries_the_same(worked: list[Any]) -> None:
    """As on GPUs: by the collectives of the backend, here of Gloo under another name."""
    assert_shared(worked, "other backend", [packet_of(rank, (2, 3, 4)).numpy() for rank in RANKS])


def test_groups_overlap_and_are_made_by_their_members_alone(worked: list[Any]) -> None:
    packets = torch.stack([packet_of(rank, (5,)) for rank in RANKS])
    for group in ([0, 1], [1, 2], [0, 2], [0, 1, 2]):
        for rank in RANKS:
            name = f"group {group}"
            assert (name in worked[rank]) == (rank in group)
            if rank in group:
                assert torch.equal(worked[rank][name], packets[group])


def test_members_are_counted_and_strangers_refused(worked: list[Any]) -> None:
    for rank, found in enumerate(worked):
        assert found["members"] == (3, 1)
        assert found["members compiled"] == 3
        assert found["members of nothing"] == 1
        for name in ("no member", "no rank"):
            assert found[name]["kind"] == "OptionError"
            assert f"0 to 2, and this one, {rank}, must be among them" in found[name]["error"]


def test_without_torch_distributed_a_process_shares_with_itself() -> None:
    ranks, packet = Ranks((0, 1), 1.0), packet_of(0, (2, 3)).requires_grad_()
    assert members(ranks) == 1
    for function in (gather, differentiable_gather):
        assert torch.equal(function(packet, ranks, "x"), packet[None])
    for function in (add, differentiable_add):
        total = function(packet, ranks, "x")
        assert torch.equal(total, packet)
        assert total.data_ptr() != packet.data_ptr()
    cotangent = packet_of(1, (1, 2, 3))
    (gradient,) = torch.autograd.grad(differentiable_gather(packet, ranks, "x"), packet, cotangent)
    assert torch.equal(gradient, cotangent[0])


def test_a_group_that_is_initialized_anew_shares_anew(worked: list[Any]) -> None:
    for found in worked:
        assert torch.equal(found["again"], torch.stack([packet_of(rank, (5,)) for rank in RANKS]))


def test_a_forked_child_leaves_its_parents_connections_alone(worked: list[Any]) -> None:
    assert [found["forked"] for found in worked] == [3] * 3


def _in_one_process() -> tuple[Tensor, Tensor, Tensor]:
    """Return all ranks' packets, first derivatives of the sum of all losses, and derivatives of these."""
    packets, cotangents, seconds = map(torch.stack, zip(*map(table_of, RANKS), strict=True))
    packets.requires_grad_()
    total = packets.sin().sum(0)
    loss = torch.stack([loss_of(packets, total, cotangent) for cotangent in cotangents]).sum()
    (first,) = torch.autograd.grad(loss, packets, create_graph=True)
    (second,) = torch.autograd.grad((first * seconds).sum(), packets)
    return seconds, first.detach(), second


def test_gradients_of_both_orders_are_those_of_one_process(worked: list[Any]) -> None:
    _, first, second = _in_one_process()
    for rank, found in enumerate(worked):
        torch.testing.assert_close(found["first"], first[rank], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(found["func first"], first[rank], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(found["second"], second[rank], rtol=1e-13, atol=1e-13)


def test_a_layer_gathers_over_the_default_group_in_its_own_dtype(worked: list[Any]) -> None:
    packets, cotangents, _ = map(torch.stack, zip(*map(table_of, RANKS), strict=True))
    for rank, found in enumerate(worked):
        gathered, dx = found["default group"]
        assert torch.equal(gathered, packets.float())
        assert gathered.dtype == dx.dtype == torch.float32
        torch.testing.assert_close(dx, cotangents.sum(0)[rank].float(), rtol=1e-6, atol=1e-6)


def test_tangents_and_batches_are_shared_too(worked: list[Any]) -> None:
    seconds, _, _ = _in_one_process()
    packets = torch.stack([table_of(rank)[0] for rank in RANKS])
    for found in worked:
        for name, values in (("tangents", seconds), ("batched", packets)):
            torch.testing.assert_close(found[name][0], values, rtol=0, atol=0)
            torch.testing.assert_close(found[name][1], values.sum(0), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("scenario", ["same length", "shorter", "longer", "other act", "other backend"])
def test_a_rank_that_skips_a_layer_pairs_with_nobody(failed: list[Any], scenario: str) -> None:
    """All raise, at once; each names its own layer, and what others sent in its place."""
    for rank, of_rank in enumerate(failed):
        found = of_rank[scenario]
        assert found["kind"] == "RankError"
        assert found["seconds"] < PATIENCE / 2  # of a timeout of PATIENCE
        assert found["layer"] == ("next" if rank == 1 else "skipped")
        others = (
            "ranks 0, 2 sent something else, 'skipped'" if rank == 1 else "rank 1 sent something else, 'next'"
        )
        assert others in found["error"]
        assert "no sign" not in found["error"]


@pytest.mark.parametrize("scenario", ["sleeps", "elsewhere", "late"])
def test_a_rank_that_does_not_come_is_named(failed: list[Any], scenario: str) -> None:
    """It alone, though the others began to wait at different times; and it is told when it does come."""
    for rank, of_rank in enumerate(failed):
        found = of_rank[scenario]
        assert found["kind"] == "RankError"
        assert found["layer"] == ("first of all" if scenario == "late" else "waits")
        if rank == 1:
            told = "gave up before this one came" if scenario == "late" else "this rank came too late"
            assert told in found["error"]
        else:
            assert found["seconds"] < PATIENCE / 2
            named = {"no sign of rank 1, which", "rank 1 did not come within", "gave up before rank 1 came"}
            assert any(words in found["error"] for words in named), found["error"]
            assert "ranks" not in found["error"].partition(". These ranks")[0]


def test_after_a_failure_nothing_is_shared_until_all_begin_anew(failed: list[Any]) -> None:
    for found in failed:
        again = found["sleeps, once more"]
        assert again["seconds"] < PATIENCE / 2
        assert again["layer"] == "later"
        assert found["sleeps"]["error"] in again["error"]
        assert "destroy_process_group() and init_process_group() on every rank" in again["error"]
        assert found["healed"].shape == (3, 5)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_that_is_killed_is_missed_long_before_the_timeout(tmp_path: Path, victim: int) -> None:
    """Rank 0 takes the store with it, by which the others would tell each other."""
    (tmp_path / "victim").write_text(str(victim))
    found = found_by_ranks(collectives_rank, 3, tmp_path, 3, "is_killed", lost={victim})
    for of_rank in (found[rank]["waits"] for rank in RANKS if rank != victim):
        assert of_rank["kind"] == "RankError"
        assert of_rank["layer"] == "features.3 forward"
        assert of_rank["seconds"] < PATIENCE / 2  # of a timeout of PATIENCE
        told = "no sign of rank 1, which was killed" if victim else "most often rank 0, was killed"
        assert told in of_rank["error"]


def test_where_the_host_does_not_wait_a_log_lists_what_was_sent(tmp_path: Path) -> None:
    """The watchdog of a backend names a collective by its number; the log says whose it is."""
    found = found_by_ranks(collectives_rank, 2, tmp_path, 2, "logs")
    assert all(of_rank["waits"]["kind"] == "RankError" for of_rank in found)
    assert 0.5 < found[0]["overdue"] < 0.9  # of the timeout
    (logged,) = found[0]["log"]
    assert "2: 'features.3 forward' (gather 5 float64) of call 0\n3: 'features.4" in logged
    assert found[1]["log"] == []  # all that it sent was received
