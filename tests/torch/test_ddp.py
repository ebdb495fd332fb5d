"""Under DistributedDataParallel: two real processes over Gloo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.torch import ddp_rank
from tests.torch.twins import assert_identical


def test_two_processes_train_as_with_stock_layers(tmp_path: Path) -> None:
    """Parameters agree with stock's and between ranks; running statistics stay each rank's own.

    Row 23: with `lean` around forwards, every bit is as without.
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, ddp_rank.__file__, str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    found = [torch.load(tmp_path / f"found{rank}.pt", weights_only=True) for rank in range(2)]
    for of_rank in found:
        assert of_rank["ours"].keys() == of_rank["stock"].keys()
        for name, stock in of_rank["stock"].items():
            torch.testing.assert_close(of_rank["ours"][name], stock, rtol=1e-4, atol=1e-5, msg=name)
        assert_identical(of_rank["lean"], of_rank["ours"])
    first, second = found[0]["ours"], found[1]["ours"]
    for name, value in first.items():
        is_local = "running_mean" in name or "running_var" in name
        assert torch.equal(value, second[name]) != is_local, name
