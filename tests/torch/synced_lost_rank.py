"""One of two processes of torch.distributed, of which one goes astray: each saves the error that it gets."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import batchnorm
from batchnorm.errors import RankError
from batchnorm.torch.collectives import lost_ranks, process_groups

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
    """Run a step with both ranks, and then what goes wrong; save the error and how long it took."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    model = Net()
    y = model(torch.randn(4, 3), False)
    y.backward(torch.randn_like(y))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    act = {
        "skips": _skips,
        "killed": _is_killed,
        "asleep": _sleeps,
        "interrupted": _is_interrupted,
        "half a backward": _goes_back_halfway,
    }[how]
    start = time.monotonic()
    try:
        act(model, rank, folder)
        found: dict[str, object] = {"error": ""}
    except (RankError, KeyboardInterrupt) as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    same = all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    found |= {"seconds": time.monotonic() - start, "unchanged": same}
    torch.save(found, folder / f"found{rank}.pt")
    os._exit(0)  # no barrier: the other one may be gone


def _skips(model: Net, rank: int, _folder: Path) -> None:
    """Rank 1 passes the first layer over."""
    lost_ranks._SOON = TIMEOUT / 4  # all answer, however slow they are
    model(torch.randn(4, 3), rank == 1)


def _is_killed(model: Net, rank: int, _folder: Path) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    model(torch.randn(4, 3), False)


def _wait_for_rank_0(folder: Path) -> None:
    while not (folder / "found0.pt").exists():
        time.sleep(0.01)


def _sleeps(model: Net, rank: int, folder: Path) -> None:
    """Rank 1 sleeps till rank 0 has given up."""
    if rank == 1:
        _wait_for_rank_0(folder)
    for exchange in _exchanges():
        exchange._transport.timeout = exchange._board._timeout = SHORT
    model(torch.randn(4, 3), False)


def _is_interrupted(model: Net, rank: int, folder: Path) -> None:
    """Somebody presses Ctrl-C while rank 0 waits for rank 1."""
    if rank == 1:
        _wait_for_rank_0(folder)
    else:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=_press, args=(_exchanges()[0],)).start()
    model(torch.randn(4, 3), False)


def _press(exchange: Any) -> None:
    while exchange._began is None:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def _exchanges() -> list[Any]:
    return [exchange for made in process_groups._made.values() for exchange in made.values()]


def _goes_back_halfway(model: Net, rank: int, _folder: Path) -> None:
    """One layer is called twice, and rank 1 runs the backward of the first call only."""
    lost_ranks._SOON = TIMEOUT / 4
    model.first.momentum = 0.0  # the state stays as it is
    calls = [model.first(torch.randn(4, 3, requires_grad=True)) for _ in range(2)]
    model.first.num_batches_tracked -= 2
    calls = calls[:1] if rank == 1 else calls
    torch.autograd.backward(calls, [torch.randn(4, 3) for _ in calls])
