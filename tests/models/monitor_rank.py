"""One of two processes of torch.distributed, which monitor a network under DistributedDataParallel.

It saves what it logged, and the state after training with and without the monitor.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import distributed, nn

import batchnorm
from batchnorm.loggers import Row


def network() -> nn.Sequential:
    """Return the same network in every process; its first norm has the statistics of all ranks."""
    torch.manual_seed(0)
    norm = batchnorm.SyncBatchNorm(6)
    return nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 3), batchnorm.BatchNorm1d(3))


def shard(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the data of a rank: as many samples as no other has."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(8 + 4 * rank, 4, generator=generator) + rank
    return x, torch.randn(len(x), 3, generator=generator)


def train(model: nn.Module, rank: int) -> None:
    """Take three steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, target = shard(rank)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) * target).mean().backward()
        optimizer.step()


def main(rank: int, folder: Path) -> None:
    """Be one rank."""
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    net = network()
    parallel = nn.parallel.DistributedDataParallel(net)
    plain = nn.parallel.DistributedDataParallel(copy.deepcopy(net))
    rows: list[tuple[int, Row]] = []
    with batchnorm.monitor(parallel, lambda row, step: rows.append((step, row)), every=2) as handle:
        train(parallel, rank)
    train(plain, rank)
    state = {"net": net.state_dict(), "plain": plain.module.state_dict()}
    torch.save({"rows": rows, "steps": handle.step, **state}, folder / f"found{rank}.pt")
    distributed.destroy_process_group()
