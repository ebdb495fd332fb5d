"""One of two processes of torch.distributed.

Under DistributedDataParallel it trains networks with stock norms, with ours, and with ours within `lean`;
then the first two with frozen norms; and saves them all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

import batchnorm

STEPS = 3
Around = Callable[[], AbstractContextManager[object]]


class Block(nn.Module):
    """conv → norm → relu, then norm → add → relu, then a linear layer."""

    def __init__(self, ours: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 20, 3, padding=1)
        norm = batchnorm.BatchNorm2d if ours else nn.BatchNorm2d
        self.first, self.second = norm(20), norm(20)
        self.ours = ours
        if ours:
            self.first = batchnorm.BatchNorm2d(20, activation="relu")
            self.second = batchnorm.BatchNorm2d(20, activation="relu")
        self.linear = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.conv(x)
        if self.ours:
            x = self.second(self.first(x), residual=x)
        else:
            x = torch.relu(self.second(torch.relu(self.first(x))) + x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def train(model: nn.Module, rank: int, around: Around = contextlib.nullcontext) -> dict[str, Tensor]:
    """Return the state after some steps on this rank's half of the data, with `around` around forwards."""
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        x = torch.randn(6, 3, 18, 17, generator=generator) + rank
        target = torch.randint(4, (6,), generator=generator)
        optimizer.zero_grad()
        with around():
            loss = nn.functional.cross_entropy(parallel(x), target)
        loss.backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def main(rank: int, folder: Path) -> None:
    """Train the networks from one state."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    torch.manual_seed(rank)  # DistributedDataParallel hands out the first one's parameters
    stock, ours, lean = Block(ours=False), Block(ours=True), Block(ours=True)
    for model in (ours, lean):
        model.load_state_dict(stock.state_dict())
    found = {
        "stock": train(stock, rank),
        "ours": train(ours, rank),
        "lean": train(lean, rank, batchnorm.lean),
    }
    for model in (stock, ours):  # with the statistics that they have by now
        for norm in (model.first, model.second):
            if model is ours:
                norm.statistics = batchnorm.Running()
            else:
                norm.eval()
    found |= {"frozen stock": train(stock, rank), "frozen ours": train(ours, rank)}
    torch.save(found, folder / f"found{rank}.pt")
    distributed.destroy_process_group()
