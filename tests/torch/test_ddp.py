"""Under DistributedDataParallel: two real processes over Gloo."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.ranks import found_by_ranks
from tests.torch import ddp_rank
from tests.torch.twins import assert_identical


def test_two_processes_train_as_with_stock_layers(tmp_path: Path) -> None:
    """Parameters agree with stock's and between ranks; running statistics stay each rank's own.

    Row 23: with `lean` around forwards, every bit is as without.
    """
    found = found_by_ranks(ddp_rank, 2, tmp_path)
    for of_rank in found:
        for kind in ("", "frozen "):
            ours, stock = (of_rank[f"{kind}{whose}"] for whose in ("ours", "stock"))
            assert ours.keys() == stock.keys()
            for name, value in stock.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=f"{kind}{name}")
        # A frozen norm's statistics stay: those of the first rank, which DistributedDataParallel hands out.
        for name, value in found[0]["ours"].items():
            is_statistic = "running_" in name or "num_batches" in name
            assert torch.equal(of_rank["frozen ours"][name], value) == is_statistic, name
        assert_identical(of_rank["lean"], of_rank["ours"])
    first, second = found[0]["ours"], found[1]["ours"]
    for name, value in first.items():
        is_local = "running_mean" in name or "running_var" in name
        assert torch.equal(value, second[name]) != is_local, name
