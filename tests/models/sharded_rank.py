"""One of two processes of torch.distributed.

It shards three networks of one state with `fully_shard`, converts one and freezes one of them after that,
trains all three, and saves what they end with. It does the same with networks that it converts and then wraps
in `FullyShardedDataParallel`, with the original parameters and with flat ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard

import batchnorm


def network() -> nn.Module:
    """Return a network whose norms are sharded alone, within a block, and with the rest."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), block, nn.Flatten(), nn.LazyLinear(6),
                          nn.BatchNorm1d(6))  # fmt: skip
    model(torch.randn(2, 3, 8, 8))
    return model


def shard(model: nn.Module) -> nn.Module:
    """Shard the last norm alone, the block, and the rest."""
    for part in (model[5], model[2], model):
        fully_shard(part)
    assert isinstance(model[5], FSDPModule)
    return model


def wrap(model: nn.Module, use_orig_params: bool) -> nn.Module:
    """Wrap the last norm alone, the block, and the rest in FSDP's first form."""

    def wrapped(part: nn.Module) -> nn.Module:
        # Without a device it asks for an accelerator.
        return FullyShardedDataParallel(part, use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    model[5], model[2] = wrapped(model[5]), wrapped(model[2])
    return wrapped(model)


def train_wrapped(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Return the whole state of a model in FSDP's first form after some steps."""
    train(model, rank)
    with FullyShardedDataParallel.summon_full_params(model):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {name.replace("_fsdp_wrapped_module.", ""): value.detach().clone() for name, value in tensors}


def train(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Return the whole state after some steps on this rank's data."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        x, dy = (torch.randn(shape, generator=generator) for shape in ((6, 3, 8, 8), (6, 6)))
        optimizer.zero_grad()
        model.train()(x).backward(dy)
        optimizer.step()
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in model.state_dict().items()
    }


def main(rank: int, folder: Path) -> None:
    """Train the networks."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    stock, ours, frozen = (shard(network()) for _ in range(3))
    parameters = [id(parameter) for parameter in ours.parameters()]
    batchnorm.convert(ours)
    assert [id(parameter) for parameter in ours.parameters()] == parameters
    kinds = [type(ours[place]) for place in (1, 5)]
    assert kinds[0] is batchnorm.BatchNorm2d
    assert issubclass(kinds[1], FSDPModule), kinds
    assert issubclass(kinds[1], batchnorm.BatchNorm1d), kinds
    assert kinds[1].__name__ == "FSDPBatchNorm1d"
    batchnorm.freeze(frozen)
    found = {"stock": train(stock, rank), "ours": train(ours, rank), "frozen": train(frozen, rank)}
    for how, use_orig_params in (("original", True), ("flat", False)):
        for whose in ("stock", "ours"):
            model = network() if whose == "stock" else batchnorm.convert(network())
            found[f"{how} {whose}"] = train_wrapped(wrap(model, use_orig_params), rank)
    batchnorm.revert(ours)
    assert type(ours[5]).__mro__[1:3] == (FSDPModule, nn.BatchNorm1d), type(ours[5]).__mro__
    ours(torch.randn(4, 3, 8, 8))
    torch.save(found, folder / f"found{rank}.pt")
    distributed.destroy_process_group()
