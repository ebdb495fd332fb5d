"""Row 22: two real processes of torch.distributed share the statistics of layers on the torch backend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import torch

from tests.support.compare import assert_close
from tests.support.ranks import found_by_ranks

from . import lost_rank, one_rank, test_synced_policies, test_synchronized
from .gradients import Array
from .policy_cases import EPSILON, Case, made_for
from .test_numbers import made

F32 = torch.float32
pytestmark = [
    pytest.mark.skipif(keras.backend.backend() != "torch", reason="a way of the torch backend"),
    pytest.mark.xdist_group("keras on torch.distributed"),
    pytest.mark.slow,
]
POLICIES = {"ghost": True, "ghost-in-turn": False, "renorm": False}  # masked?
MASKS = ("none", "one-empty")


class Scenario(NamedTuple):
    """A layer, which stays as it is, and the x, dy and mask of two replicas."""

    layer: Any
    options: dict[str, Any]
    xs: list[Array]
    dys: list[Array]
    masks: list[Array] | None


def scenarios() -> Iterator[tuple[str, Scenario]]:
    for masks in MASKS:
        yield masks, Scenario(made(5, -1, 3), {"synchronized": True}, *test_synchronized.inputs(masks, 1e5))
    for over, masked in POLICIES.items():
        policy = test_synced_policies.OVER[over]
        options = {"statistics": policy.config(), "epsilon": EPSILON}
        yield (
            over,
            Scenario(made_for(Case(policy), 5, -1, 3), options, *test_synced_policies.inputs(masked)),
        )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Scenario, list[dict[str, Array]]]]:
    """Scenarios, and what each rank found of them: two processes for all, as Keras is slow to import."""
    folder, every = tmp_path_factory.mktemp("ranks"), dict(scenarios())
    for rank in range(2):
        given = {}
        for name, one in every.items():
            weights = dict(zip(("gamma", "beta", "mean", "var"), one.layer.get_weights(), strict=True))
            mask = {} if one.masks is None else {"mask": one.masks[rank]}
            arrays = {"x": one.xs[rank], "dy": one.dys[rank], **mask, **weights}
            given[name] = {
                "options": json.dumps(one.options),
                **{what: torch.tensor(array) for what, array in arrays.items()},
            }
        torch.save(given, folder / f"given{rank}.pt")
    found = found_by_ranks(one_rank, 2, folder)
    return {
        name: (one, [{what: t.numpy() for what, t in of_rank[name].items()} for of_rank in found])
        for name, one in every.items()
    }


@pytest.mark.parametrize("over", POLICIES)
def test_row_22_synced_policies(ran: Any, over: str) -> None:
    one, found = ran[over]
    policy = test_synced_policies.OVER[over]
    wanted = test_synced_policies.one_process(policy, (one.xs, one.dys, one.masks), one.layer.get_weights())
    test_synced_policies.check(found, wanted, one.masks)


@pytest.mark.parametrize("masks", MASKS)
def test_row_22_synchronized(ran: Any, masks: str) -> None:
    one, found = ran[masks]
    expected, mean, var = test_synchronized.expect(one.layer, one.xs, one.dys, one.masks)
    assert_close(np.concatenate([part["y"] for part in found]), expected.y, dtype=F32, what="y")
    assert_close(np.concatenate([part["dx"] for part in found]), expected.dx, dtype=F32, what="dx")
    for name in ("dgamma", "dbeta"):
        assert_close(sum(part[name] for part in found), getattr(expected, name), dtype=F32, what=name)
    for name, value in (("moving_mean", mean), ("moving_variance", var)):
        np.testing.assert_array_equal(found[0][name], found[1][name])
        assert_close(found[0][name], value, dtype=F32, what=name)


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each rank found of every scenario in which rank 1 skips a layer."""
    return found_by_ranks(lost_rank, 2, tmp_path_factory.mktemp("lost"))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("way", lost_rank.OPTIONS)
def test_a_rank_that_does_not_come_is_named_with_the_layer(lost: Any, way: str, masked: bool) -> None:
    name = f"{way} go_elsewhere {masked}"
    error = lost[0][name]["error"]
    assert "first (BatchNormalization) forward: rank 0 could not share statistics (gather " in error
    assert "no sign of rank 1, which was killed, or is elsewhere and did not come within 2 s" in error
    assert lost[1][name]["error"] == ""
    assert all(of_rank[name]["unchanged"] for of_rank in lost)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("way", lost_rank.OPTIONS)
def test_a_rank_in_another_layer_is_named_with_both(lost: Any, way: str, masked: bool) -> None:
    name = f"{way} go_on {masked}"
    for rank, (own, others) in enumerate((("first", "second"), ("second", "first"))):
        error = lost[rank][name]["error"]
        assert f"{own} (BatchNormalization) forward: rank {rank} could not share statistics" in error
        assert f"rank {1 - rank} sent something else, '{others} (BatchNormalization) forward'" in error
        assert lost[rank][name]["unchanged"]
