"""Models that both forms of FSDP have sharded: two real processes over Gloo."""

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
        # FSDP's first form keeps parameters in a flat one, whose memory it frees between the calls.
        for wrapped in ("original stock", "original ours", "flat stock", "flat ours"):
            assert found[wrapped].keys() == found["stock"].keys()
            for name, value in found["stock"].items():
                what = f"{wrapped}: {name}"
                torch.testing.assert_close(found[wrapped][name], value, rtol=1e-4, atol=1e-5, msg=what)
