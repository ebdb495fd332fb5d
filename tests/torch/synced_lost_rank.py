"""One of two processes of torch.distributed, of which one goes astray.

Saves the error that it gets.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

import batchnorm
from batchnorm.errors import RankError
from batchnorm.torch.ranks import process_groups

TIMEOUT = 300.0
SHORT = 2.0  # seconds, the timeout of rank 0 where rank 1 sleeps


class Net(nn.Module):
    """Two norms of one size; a rank may pass the first over."""

    def __init__(self) -> None:
        super().__init__()
        policy = batchnorm.Synced(timeout=TIMEOUT)
        self.first, self.second = (batchnorm.BatchNorm1d(3, statistics=policy) for _ in range(2))

    def forward(self, x: Tensor, skips: bool) -> Tensor:
        """Return `[N, 3]`."""
        y: Tensor = self.second(x if skips else self.first(x))
        return y


def main(rank: int, how: str, folder: Path) -> None:
    """Run a step with both; then one in which rank 1 skips a layer, is killed, or sleeps till 0 gives up."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    model = Net()
    y = model(torch.randn(4, 3), False)
    y.backward(torch.randn_like(y))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    astray = rank == 1
    if astray and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "asleep":
        while astray and not (folder / "found0.pt").exists():
            time.sleep(0.01)
        for made in process_groups._made.values():
            for sharing in made.values():
                sharing._wire.timeout = sharing._board._timeout = SHORT
    start = time.monotonic()
    try:
        model(torch.randn(4, 3), astray and how == "skips")
        found: dict[str, object] = {"error": ""}
    except RankError as error:
        found = {"error": str(error)}
    same = all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    found |= {"seconds": time.monotonic() - start, "unchanged": same}
    torch.save(found, folder / f"found{rank}.pt")
    os._exit(0)  # no barrier: the other one may be gone
