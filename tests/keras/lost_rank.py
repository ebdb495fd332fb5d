"""One of two processes of torch.distributed, of which rank 1 skips a layer of Keras; each saves its error."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

import batchnorm
from batchnorm.errors import RankError
from batchnorm.keras import BatchNormalization
from batchnorm.torch.collectives import lost_ranks, process_groups

SHORT = 2.0  # seconds that rank 0 waits for rank 1, which does not come
PATIENCE = 300.0  # seconds that no machine is so slow as to need
OPTIONS: dict[str, dict[str, Any]] = {
    "synchronized": {"synchronized": True},
    "synced": {"statistics": batchnorm.Synced()},
}


def net(options: dict[str, Any]) -> list[BatchNormalization]:
    """Return two built layers of one size."""
    layers = [BatchNormalization(name=name, **options) for name in ("first", "second")]
    for layer in layers:
        layer.build((None, 4, 5))
    return layers


def call(layer: BatchNormalization, masked: bool) -> torch.Tensor:
    """Call a layer in training."""
    mask = torch.arange(12).reshape(3, 4) % 3 > 0 if masked else None
    y: torch.Tensor = layer(torch.randn(3, 4, 5), training=True, mask=mask)
    return y


def go_elsewhere(layers: list[BatchNormalization], rank: int, masked: bool) -> None:
    """Rank 1 skips the first layer, and then waits for something else until rank 0 has given up."""
    store = distributed.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["gave up"], timedelta(seconds=PATIENCE))
        return
    lost_ranks._SOON = 0.5  # rank 1 never answers
    for made in process_groups._made.values():
        for exchange in made.values():
            exchange._transport.timeout = exchange._board._timeout = SHORT  # type: ignore[union-attr]
    try:
        call(layers[0], masked)
    finally:
        store.set("gave up", "")


def go_on(layers: list[BatchNormalization], rank: int, masked: bool) -> None:
    """Rank 1 skips the first layer, and goes on with the second."""
    lost_ranks._SOON = PATIENCE / 4  # both answer, however slow they are
    call(layers[rank], masked)


def main(rank: int, folder: Path) -> None:
    """Run every scenario."""
    found: dict[str, dict[str, object]] = {}
    for way, options in OPTIONS.items():
        for act in (go_elsewhere, go_on):
            for masked in (False, True):
                name = f"{way} {act.__name__} {masked}"
                where = f"file://{folder / name.replace(' ', '-')}"
                distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
                layers = net(options)
                for layer in layers:
                    y = call(layer, masked)
                    y.backward(torch.randn_like(y))
                before = [weight.numpy().copy() for layer in layers for weight in layer.weights]
                error = ""
                try:
                    act(layers, rank, masked)
                except RankError as raised:
                    error = str(raised)
                after = [weight.numpy() for layer in layers for weight in layer.weights]
                same = all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
                found[name] = {"error": error, "unchanged": same}
                distributed.destroy_process_group()
    torch.save(found, folder / f"found{rank}.pt")
