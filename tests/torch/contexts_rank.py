"""One of two processes of torch.distributed: contexts around a model of which ranks share statistics."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.statistics.policy import Policy
from tests.torch.twins import scramble

RENORM = batchnorm.Renorm(1.5, 0.5, r_steps=(0, 0), d_steps=(0, 0))


def model_of(policy: Policy) -> nn.Module:
    """Return a pointwise model, equal on all ranks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 4, 1), scramble(batchnorm.BatchNorm1d(4, statistics=policy, activation="silu"))
    )


def batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Return the micro-batches of a rank, of its own sizes, with masks and garbage where these leave out."""
    torch.manual_seed(1 + rank)
    found = []
    for samples in ((3, 5), (2, 4))[rank]:
        x, mask = torch.randn(samples, 3, 6) * (rank + 1) + samples, torch.rand(samples, 6) > 0.3
        found.append((torch.where(mask.unsqueeze(1), x, 1e30), mask))
    return found


def accumulated(rank: int) -> dict[str, Tensor]:
    """Return the state after one step of two micro-batches."""
    model = model_of(batchnorm.Synced())
    with batchnorm.accumulate(model, 2):
        for x, mask in batches(rank):
            with batchnorm.mask(model, mask):
                model(x)
    return dict(model.state_dict())


def checkpointed(rank: int) -> dict[str, Tensor]:
    """Return gradients with and without checkpointing, whose backwards are outside of the masks' blocks."""
    found = {}
    for way in ("plain", "reentrant", "not"):
        model = model_of(batchnorm.Synced(over=RENORM))
        leaves, outputs = [], []
        for x, mask in batches(rank):
            leaves.append(x.requires_grad_())
            with batchnorm.mask(model, mask):
                if way == "plain":
                    outputs.append(model(x))
                else:
                    outputs.append(checkpoint(model, x, use_reentrant=way == "reentrant"))
        torch.manual_seed(5)
        for number, (leaf, y) in enumerate(zip(leaves, outputs, strict=True)):
            y.backward(torch.randn_like(y))
            found[f"{way} {number}"] = leaf.grad
        found |= {f"{way} {name}": buffer for name, buffer in model.named_buffers()}
    return found


def of_domains(rank: int) -> dict[str, dict[str, Tensor | None]]:
    """Return gradients with DistributedDataParallel and without, where the ranks have other domains."""
    found = {}
    for way in ("plain", "parallel"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(3, 4, 1), batchnorm.BatchNorm1d(4, domains=4, domain_affine=True))
        called = (
            nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
            if way == "parallel"
            else model
        )
        torch.manual_seed(1 + rank)
        with batchnorm.domain(called, torch.tensor([0, rank + 1, 0, rank + 1])):
            y = called(torch.randn(4, 3, 6))
        y.backward(torch.randn_like(y))
        found[way] = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found


def main(rank: int, folder: Path) -> None:
    """Run everything."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    found = {
        "accumulated": accumulated(rank),
        "checkpointed": checkpointed(rank),
        "of domains": of_domains(rank),
    }
    torch.save(found, folder / f"found{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
