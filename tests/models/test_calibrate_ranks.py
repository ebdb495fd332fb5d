"""`calibrate` over torch.distributed: real processes over Gloo, with uneven data and with none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import batchnorm
from batchnorm.errors import OptionError
from tests.models import calibrate_rank
from tests.models.calibrate_rank import METHODS, SHARDS, running, shard, whole
from tests.support.ranks import found_by_ranks

pytestmark = pytest.mark.xdist_group("calibrate on ranks")  # processes are started once

Found = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The results of each rank in each scenario."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    return found_by_ranks(calibrate_rank, request.param, folder, request.param, "scenarios")


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    """Long before the timeout of the process group, half an hour; and nothing has changed."""
    for of_rank in found_by_ranks(calibrate_rank, 3, tmp_path, 3, "one is killed", lost={2})[:2]:
        assert of_rank["error"].startswith("RankError: calibrate: rank ")
        assert "no sign of rank 2, which was killed" in of_rank["error"]
        assert of_rank["is_unchanged"]


def _assert_same_on_all(found: Found, scenario: str) -> None:
    first, *others = (of_rank[scenario] for of_rank in found)
    assert "running" in first, first
    for other in others:
        assert other["report"] == first["report"]
        for name, value in first["running"].items():
            assert torch.equal(other["running"][name], value), f"{scenario}: {name}"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scenario", ["all", "parallel", "afterwards"])
def test_any_number_of_ranks_finds_what_one_finds(found: Found, method: str, scenario: str) -> None:
    """Pain row 10: uneven shards, a rank with no data; the same on every rank, bit for bit."""
    _assert_same_on_all(found, f"{method} {scenario}")
    model, x = whole()
    # The same batches in one process: with method="batch" deeper layers depend on the split.
    batches = [part for rank in range(len(found)) for part in shard(rank, len(found), x)]
    batchnorm.calibrate(model, batches if method == "batch" else [x], method=method)
    of_first = found[0][f"{method} {scenario}"]
    assert of_first["samples"] == 203
    assert f", {len(found)} ranks" in of_first["report"]
    for name, value in running(model).items():
        torch.testing.assert_close(of_first["running"][name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_merged_statistics_of_ranks_are_those_of_all_data(found: Found) -> None:
    """Pain rows 40 and 58: `merge_statistics` over a process group, with a rank that has no data."""
    x = whole()[1]
    merged = [of_rank["merge"] for of_rank in found]
    channels = x.double().transpose(0, 1).flatten(1)
    for of_rank in merged:
        torch.testing.assert_close(of_rank["all"], merged[0]["all"], rtol=0, atol=0)
        torch.testing.assert_close(of_rank["alone"]["running_var"], of_rank["state"]["running_var"])
        assert "the states of the ranks are not of the same layers" in of_rank["layers"]
    torch.testing.assert_close(
        merged[0]["all"]["running_mean"].double(), channels.mean(1), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(merged[0]["all"]["running_var"].double(), channels.var(1), rtol=1e-6, atol=0)
    assert "DataError: there is no state to merge" in merged[0]["error"]
    assert "merge_statistics changed nothing on any rank, because rank 0 raised" in merged[-1]["error"]
    ends = [merged[0]["pair"], merged[-1]["pair"]]
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    for other in merged[1:-1]:
        assert "not of the group: call merge_statistics" in other["pair"]


@pytest.mark.parametrize("method", METHODS)
def test_one_process_can_stay_alone(found: Found, method: str) -> None:
    model, x = whole()
    batchnorm.calibrate(model, x.split(64), method=method)
    for of_rank in found:
        alone = of_rank[f"{method} alone"]
        torch.testing.assert_close(alone["running"], running(model), rtol=1e-6, atol=1e-6)
        assert "ranks" not in alone["report"]


@pytest.mark.parametrize("method", METHODS)
def test_a_group_calibrates_without_the_others(found: Found, method: str) -> None:
    ends = [found[0], found[-1]]
    _assert_same_on_all(ends, f"{method} pair")
    assert "2 ranks" in ends[0][f"{method} pair"]["report"]
    for other in found[1:-1]:
        assert "not of the group" in other[f"{method} pair"]["error"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("scenario", "own", "told"),
    [
        ("error", "ValueError: the disk is on fire", "rank 0 raised ValueError: the disk is on fire"),
        ("interrupt", "KeyboardInterrupt: ", "rank 0 raised KeyboardInterrupt: "),
        ("option", "OptionError: samples is a number", "rank 0 raised OptionError: samples is a number"),
        ("nan", "DataError", "DataError"),
    ],
)
def test_an_error_on_one_rank_changes_nothing_on_any(
    found: Found, method: str, scenario: str, own: str, told: str
) -> None:
    first, *others = (of_rank[f"{method} {scenario}"] for of_rank in found)
    assert first["error"].startswith(own)
    for other in others:
        assert told in other["error"]
    assert all(outcome["is_unchanged"] for outcome in (first, *others))


def test_forwards_stop_together_on_all_ranks(found: Found) -> None:
    _assert_same_on_all(found, "spilled")
    of_passes, first = found[0]["layerwise all"], found[0]["spilled"]
    torch.testing.assert_close(first["running"], of_passes["running"], rtol=1e-6, atol=1e-6)
    assert first["samples"] == 203
    assert "bytes are too few" in found[0]["few"]["error"]
    assert "not there cannot be used" in found[0]["folder"]["error"]
    for other in found[1:]:
        assert "rank 0 raised OptionError: spill=10 bytes are too few" in other["few"]["error"]
        assert "rank 0 raised FileError: spill: " in other["folder"]["error"]


def test_ranks_with_another_model_are_told(found: Found) -> None:
    for of_rank in found:
        assert "another model or method on some ranks" in of_rank["another model"]["error"]
        assert of_rank["another model"]["is_unchanged"]


def test_each_rank_goes_on_from_its_own_file(found: Found) -> None:
    assert found[0]["stopped"]["error"] == "OSError: gone"
    files = [f"progress.safetensors.{rank}" for rank, sizes in enumerate(SHARDS[len(found)]) if sizes]
    assert [of_rank["files"] for of_rank in found] == [files] * len(found)
    for of_rank in found:
        for name, value in of_rank["batch all"]["running"].items():
            assert torch.equal(of_rank["resumed"]["running"][name], value), name


def test_each_rank_takes_a_kept_result_from_its_own_file(found: Found) -> None:
    for of_rank in found:
        for name, value in of_rank["batch all"]["running"].items():
            assert torch.equal(of_rank["kept"]["running"][name], value), name
            assert torch.equal(of_rank["taken"]["running"][name], value), name
        assert "data is not what it was" in of_rank["taken, other data"]["error"]
        assert of_rank["taken, other data"]["is_unchanged"]


def test_a_group_needs_torch_distributed() -> None:
    model, x = whole()
    with pytest.raises(OptionError, match=r"group= needs torch\.distributed"):
        batchnorm.calibrate(model, [x], group=object())
