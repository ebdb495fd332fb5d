"""Models that `fully_shard` has sharded already: two real processes over Gloo."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.models import sharded_rank
from tests.support.ranks import found_by_ranks


def test_sharded_models_are_converted_and_frozen(tmp_path: Path) -> None:
    """Classes that torch generates are recognized; the same parameters train as with stock norms. Row 4."""
    for found in found_by_ranks(sharded_rank, 2, tmp_path):
        assert found["ours"].keys() == found["stock"].keys() == found["frozen"].keys()
        for name, value in found["stock"].items():
            torch.testing.assert_close(found["ours"][name], value, rtol=1e-4, atol=1e-5, msg=name)
            if name.endswith("running_mean"):
                assert not torch.equal(value, torch.zeros_like(value))
        initial = sharded_rank.network().state_dict()
        for name, value in found["frozen"].items():
            is_statistic = "running_" in name or "num_batches" in name
            assert torch.equal(value, initial[name]) == is_statistic, name
