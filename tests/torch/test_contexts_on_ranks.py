"""Masks, accumulation and checkpointing where two real processes share statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import batchnorm
from batchnorm import reference
from tests.support.compare import as_array, assert_close
from tests.support.ranks import found_by_ranks
from tests.torch import contexts_rank

pytestmark = pytest.mark.xdist_group("contexts")


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return found_by_ranks(contexts_rank, 2, tmp_path_factory.mktemp("contexts"))


def test_row_2_and_row_20_one_update_by_all_valid_values_of_all_ranks(of_two: list[Any]) -> None:
    """Rows 2 and 20: two masked micro-batches on each of two ranks, of different sizes."""
    model = contexts_rank.model_of(batchnorm.Batch())
    parts = [part for rank in range(2) for part in contexts_rank.batches(rank)]
    with torch.no_grad():
        x = np.concatenate([as_array(model[0](x)) for x, _ in parts])
    found = reference.forward(x, mask=np.concatenate([mask.numpy() for _, mask in parts]))
    before = reference.Running(as_array(model[1].running_mean), as_array(model[1].running_var))
    expected = reference.update_running_torch(before, found.mean[0], found.var[0], float(found.count[0]))
    states = [found["accumulated"] for found in of_two]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), f"{name} differs between ranks"
    assert_close(states[0]["1.running_mean"], expected.mean, dtype=torch.float32, what="running_mean")
    assert_close(states[0]["1.running_var"], expected.var, dtype=torch.float32, what="running_var")
    assert states[0]["1.num_batches_tracked"] == 4


@pytest.mark.parametrize("way", ["reentrant", "not"])
def test_row_8_a_recompute_of_shared_statistics_is_its_first_pass(of_two: list[Any], way: str) -> None:
    """Row 8: bit for bit, with the mask, r and d of the first pass, on every rank."""
    for found in of_two:
        of_rank = found["checkpointed"]
        plain = {name: value for name, value in of_rank.items() if name.startswith("plain ")}
        assert len(plain) == 5
        for name, expected in plain.items():
            assert torch.equal(of_rank[name.replace("plain", way, 1)], expected), name


def test_row_43_ddp_averages_the_weights_of_the_domains_that_any_rank_used(of_two: list[Any]) -> None:
    """Row 43: domain 0 is on both ranks, 1 and 2 are on one each, and 3 is on none."""
    first, second = (found["of domains"]["plain"] for found in of_two)
    for found in of_two:
        for name, grad in found["of domains"]["parallel"].items():
            parts = [part for part in (first[name], second[name]) if part is not None]
            assert (grad is None) == (not parts), name
            if parts:
                torch.testing.assert_close(grad, sum(parts) / 2, rtol=1e-5, atol=1e-6)
        assert found["of domains"]["parallel"]["1.weight_3"] is None
