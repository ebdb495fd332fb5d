"""The same network with less kept for the backward: `batchnorm.lean` and checkpointing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import batchnorm

from . import networks
from .training_step import TrainingStep

# What is worth keeping: all else is recomputed, norms and activations among it.
_KEPT = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
)


@dataclass(frozen=True)
class LeanCase:
    """A network, and its batch of images."""

    network: str
    batch: int
    side: int


def stock(case: LeanCase) -> TrainingStep:
    """Return the network of torch's layers, with activations in place."""
    return _step(_network(case), case)


def ours(case: LeanCase) -> TrainingStep:
    """Return it converted and fused."""
    return _step(_fused(case), case)


def lean(case: LeanCase) -> TrainingStep:
    """Return it converted and fused, with `batchnorm.lean` around the forward."""
    return _step(_fused(case), case, batchnorm.lean)


def checkpointed(case: LeanCase) -> TrainingStep:
    """Return the network of torch's layers, each block of it under `torch.utils.checkpoint`."""
    return _step(_with_blocks(_network(case), use_reentrant=False), case)


def selective(case: LeanCase) -> TrainingStep:
    """Return the same, where blocks keep what their convolutions and linear layers put out."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return _step(_with_blocks(_network(case), use_reentrant=False, context_fn=contexts), case)


VARIANTS: dict[str, Callable[[LeanCase], TrainingStep]] = {
    "stock": stock,
    "ours": ours,
    "lean": lean,
    "checkpoint": checkpointed,
    "selective": selective,
}


def _network(case: LeanCase) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return networks.NETWORKS[case.network](networks.stock)


def _fused(case: LeanCase) -> nn.Module:
    model = _network(case)
    batchnorm.convert(model)
    batchnorm.fuse(model)
    return model


def _with_blocks(model: nn.Module, **how: Any) -> nn.Module:
    for block in networks.blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, **how)  # type: ignore[method-assign]
    return model


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _step(
    model: nn.Module, case: LeanCase, around: Callable[[], AbstractContextManager[None]] = nullcontext
) -> TrainingStep:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.side, case.side, generator=generator)
    labels = torch.randint(networks.CLASSES, (case.batch,), generator=generator)
    return TrainingStep(model, images, labels, around)
