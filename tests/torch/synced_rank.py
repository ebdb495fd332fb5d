"""One of several processes of torch.distributed.

Runs every case of `synced_cases`, and networks under what torch puts around them; saves what it finds.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.errors import RankError
from batchnorm.torch.collectives import operations as collectives
from batchnorm.torch.collectives.exchange import Exchange
from tests.torch import synced_scenarios
from tests.torch.synced_cases import CASES, Case

STEPS = 3
Found = dict[str, Any]


def run(case: Case, rank: int, **options: Any) -> Found:
    """Return what one call and its backward find on this rank."""
    layer, part = case.layer(**options), case.part(rank)
    x = part.x.requires_grad_()
    residual = None if part.residual is None else part.residual.requires_grad_()
    y = layer(x, residual, part.mask)
    y.backward(part.dy)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dresidual": None if residual is None else residual.grad,
        "dweight": layer.weight.grad,
        "dbias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "batches": layer.num_batches_tracked,
    }


class Net(nn.Module):
    """Norms in a row and side by side, in two and one dimensions, before and behind an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 3, padding=1)
        self.left_norm, self.right_norm = nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4)
        self.linear, self.last = nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)

    def stem(self, x: Tensor) -> Tensor:
        """Return the first norm's output."""
        y: Tensor = self.norm(self.conv(x)).relu()
        return y

    def sides(self, x: Tensor) -> Tensor:
        """Return the sum of two branches."""
        y: Tensor = self.left_norm(self.left(x)) + self.right_norm(self.right(x)).relu()
        return y

    def head(self, x: Tensor) -> Tensor:
        """Return `[N, 3]`."""
        y: Tensor = self.last(self.linear(x.mean((2, 3))))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Return `[N, 3]`."""
        return self.head(self.sides(self.stem(x)))


class Checkpointed(Net):
    """The same, where parts are computed again in the backward."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        """Return `[N, 3]`."""
        x = checkpoint(self.stem, x, use_reentrant=self.reentrant)
        return self.head(checkpoint(self.sides, x, use_reentrant=self.reentrant))


class Reentrant(Checkpointed):
    """The same, by torch's older way."""

    reentrant = True


def net(kind: type[Net] = Net) -> Net:
    """Return the network, the same in every process."""
    torch.manual_seed(0)
    return kind().double()


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Return a rank's images and targets."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(4, 2, 6, 5, generator=generator, dtype=torch.float64) * (1 + rank) + rank
    return x.requires_grad_(), torch.randn(4, 3, generator=generator, dtype=torch.float64)


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the state after a step of mean squares on each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, target in batches:
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    return whole(model)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state, unwrapped and whole."""
    state = {
        name.removeprefix("module.").replace("_orig_mod.", ""): t for name, t in model.state_dict().items()
    }
    return {
        n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in state.items()
    }


def sharded(model: nn.Module) -> nn.Module:
    """Return the model under FSDP2, a norm by itself, and the rest."""
    fully_shard(model.get_submodule("left_norm"))
    fully_shard(model)
    return model


def networks(rank: int) -> Found:
    """Train the network in every way that has to come to the same."""
    synced = batchnorm.SyncBatchNorm.convert_sync_batchnorm
    ways: dict[str, Callable[[], nn.Module]] = {
        "DDP": lambda: DistributedDataParallel(synced(net())),
        "policy": lambda: DistributedDataParallel(batchnorm.convert(net(), batchnorm.Synced())),
        "fused": lambda: DistributedDataParallel(batchnorm.fuse(synced(net()))),
        "checkpoint": lambda: DistributedDataParallel(synced(net(Checkpointed)), static_graph=True),
        "reentrant": lambda: DistributedDataParallel(synced(net(Reentrant)), static_graph=True),
        "FSDP2": lambda: sharded(synced(net())),
        "compiled": lambda: DistributedDataParallel(
            torch.compile(synced(net()), fullgraph=True, backend="aot_eager")
        ),
        "saved and loaded": lambda: _saved_and_loaded(DistributedDataParallel(synced(net()))),
    }
    data = [batch(rank, step) for step in range(STEPS)]
    found: Found = {name: train(make(), data) for name, make in ways.items()}
    with batchnorm.lean():
        model = DistributedDataParallel(synced(net()))
    found["lean"] = train(_Lean(model), data)
    return found


class _Lean(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with batchnorm.lean():
            y: Tensor = self.module(x)
        return y

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)


def _saved_and_loaded(model: nn.Module) -> nn.Module:
    """Row 5: a whole model is stored, with its layers; no group is in the file."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def two_forwards(rank: int) -> dict[str, Tensor]:
    """Row 9: a discriminator sees real and made images before one backward."""
    model = DistributedDataParallel(batchnorm.SyncBatchNorm.convert_sync_batchnorm(net()))
    (first, target), (second, _) = batch(rank, 0), batch(rank, 1)
    loss = (model(first) - target).square().mean() + model(second).square().mean()
    loss.backward()
    gradients = {f"{name}.grad": p.grad.clone() for name, p in model.module.named_parameters()}
    return whole(model) | gradients


def penalty(rank: int) -> Found:
    """A second derivative: the norm of the gradient by the input, as of GANs."""
    layer = CASES[0].layer().double()
    x = CASES[0].part(rank).x.double().detach().requires_grad_()
    dy = CASES[0].part(rank).dy.double()
    (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    dx.square().sum().backward()
    return {"dx": dx.detach(), "ddx": x.grad, "ddweight": layer.weight.grad}


def counted(rank: int) -> Found:
    """Row 15: how many exchanges a forward and a backward take; none in evaluation, or within one rank."""
    calls: list[str] = []
    real = Exchange.run

    def spy(self: Exchange, act: Any, *more: Any) -> Tensor:
        calls.append(act)
        return real(self, act, *more)

    case, counts = CASES[0], {}
    layer, part = case.layer(), case.part(rank)
    alone = case.layer(group=(rank,))
    Exchange.run = spy  # type: ignore[method-assign]
    try:
        y = layer(part.x.requires_grad_())
        counts["forward"] = len(calls)
        y.backward(part.dy)
        counts["backward"] = len(calls) - counts["forward"]
        before = len(calls)
        layer.eval()(part.x)
        alone(part.x).backward(part.dy)
        counts["none"] = len(calls) - before
    finally:
        Exchange.run = real  # type: ignore[method-assign]
    return {name: torch.tensor(count) for name, count in counts.items()}


BACKWARDS = ("eager", "compiled", "twice differentiable")


def _forward(way: str) -> tuple[Tensor, Tensor]:
    """Return an input of a synchronized layer, and its output."""
    layer = nn.Sequential(batchnorm.SyncBatchNorm(3))
    x = torch.randn(4, 3, requires_grad=True)
    module = torch.compile(layer, backend="aot_eager") if way == "compiled" else layer
    return x, module(x)


def _refusal(way: str, x: Tensor, y: Tensor) -> str:
    """Return the error of the backward."""
    try:
        torch.autograd.grad(y, x, torch.randn_like(y), create_graph=way == "twice differentiable")
    except RankError as error:
        return str(error)
    return "none"


def main(rank: int, world: int, folder: Path) -> None:
    """Run everything."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    found: Found = {"cases": {case.name: run(case, rank) for case in CASES}}
    if world == 3:
        group = (0, 2)
        found["sub-group"] = run(CASES[0], rank, group=group if rank in group else (1,))
    else:
        found |= {
            "networks": networks(rank),
            "two forwards": two_forwards(rank),
            "penalty": penalty(rank),
            "counted": counted(rank),
            "scenarios": synced_scenarios.on_rank(rank),
        }
    calls = {} if world == 3 else {way: _forward(way) for way in BACKWARDS}
    distributed.barrier()
    distributed.destroy_process_group()
    found["destroyed"] = {way: _refusal(way, *call) for way, call in calls.items()}
    torch.save(found, folder / f"found{rank}.pt")
    assert collectives.members(collectives.Ranks(None, 1.0)) == 1
    copy.deepcopy(CASES[0].layer())(CASES[0].part(0).x)  # once more a plain layer
