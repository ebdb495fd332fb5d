"""Synchronized statistics over Gloo, 1 to 4 ranks: a layer's step against others, and single collectives."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import batchnorm
from batchnorm.torch.collectives import operations as collectives

from .interleaved import clocked, interleave, medians, ratio
from .progress import progress
from .tables import Row, Rows, table_of, with_quartiles

WORLDS, QUICK_WORLDS = (1, 2, 3, 4), (1, 2)
SHAPES = ((64, 512), (8, 64, 28, 28), (8, 256, 14, 14), (8, 64, 56, 56))
# Numbers of float64 of a packet: from those of a norm of 8 channels to those of one of 65,536.
PACKETS = tuple(2**power for power in range(4, 18, 2))
ROUNDS, QUICK_ROUNDS = 101, 5


class _AllReduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


class ByHand(nn.Module):
    """The usual layer by hand: sums of x and x² of all ranks, by one differentiable all-reduce."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x; the variance is E[x²] - E[x]², in float32."""
        axes = [0, *range(2, x.dim())]
        count = x.new_full((1,), x.numel() / x.shape[1])
        packed = torch.cat([x.sum(axes), x.square().sum(axes), count])
        if distributed.get_world_size() > 1:
            packed = _AllReduced.apply(packed)  # type: ignore[no-untyped-call]
        total, squares, count = packed.split([x.shape[1], x.shape[1], 1])
        mean = total / count
        rstd = (squares / count - mean.square() + 1e-5).rsqrt()
        spread = (1, -1, *[1] * (x.dim() - 2))
        scale = self.weight * rstd
        return x * scale.view(spread) + (self.bias - mean * scale).view(spread)


def measure(quick: bool = False) -> Rows:
    """Return rows of layers, and of collectives, per number of ranks; each process has one thread."""
    rows: Rows = []
    for world in progress(QUICK_WORLDS if quick else WORLDS, "ranks"):
        with tempfile.TemporaryDirectory() as folder:
            context = multiprocessing.get_context("spawn")
            ranks = [
                context.Process(target=_rank, args=(rank, world, folder, quick)) for rank in range(world)
            ]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            if any(process.exitcode for process in ranks):
                raise RuntimeError("a rank has failed")
            rows += json.loads((Path(folder) / "rows.json").read_text())
    return rows


def _rank(rank: int, world: int, folder: str, quick: bool) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    rows = [_layers(shape, world, rounds) for shape in (SHAPES[:2] if quick else SHAPES)]
    if world > 1:
        rows += [_packets(numbers, world, rounds) for numbers in (PACKETS[:2] if quick else PACKETS)]
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    distributed.barrier()
    distributed.destroy_process_group()


def _layers(shape: tuple[int, ...], world: int, rounds: int) -> Row:
    channels = shape[1]
    plain = batchnorm.BatchNorm1d if len(shape) == 2 else batchnorm.BatchNorm2d
    layers = {
        "synced": batchnorm.SyncBatchNorm(channels),
        "plain": plain(channels),
        "by hand": ByHand(channels),
    }
    x, dy = torch.randn(shape).requires_grad_(), torch.randn(shape)
    times = interleave(
        {name: clocked(_step(layer, x, dy), distributed.barrier) for name, layer in layers.items()}, rounds
    )
    messages = 2 if world > 1 else 0
    return {
        "ranks": world,
        "shape": list(shape),
        "collectives": messages,
        # What a rank sends into its collectives: samples, count, mean and m2; two sums.
        "bytes": 8 * (2 + 2 * channels + 2 * channels) if messages else 0,
        "seconds": medians(times),
        "over_plain": {name: ratio(times[name], times["plain"]) for name in ("synced", "by hand")},
    }


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def step() -> None:
        torch.autograd.backward(layer(x), dy)
        x.grad = None

    return step


def _packets(numbers: int, world: int, rounds: int) -> Row:
    """Return what single collectives of a packet take, ours and torch's."""
    packet, ranks = torch.randn(numbers, dtype=torch.float64), collectives.Ranks(None, 60.0)
    rooms = [torch.empty_like(packet) for _ in range(world)]
    steps: dict[str, Callable[[], object]] = {
        "gather": lambda: collectives.gather(packet, ranks, "packet"),
        "add": lambda: collectives.add(packet, ranks, "packet"),
        "torch all_gather": lambda: distributed.all_gather(rooms, packet),
        "torch all_reduce": lambda: distributed.all_reduce(packet.clone()),
    }
    times = interleave({name: clocked(step, distributed.barrier) for name, step in steps.items()}, rounds)
    return {"ranks": world, "packet_bytes": 8 * numbers, "seconds": medians(times)}


def layers_table(rows: Rows) -> str:
    """A step of a layer, per number of ranks."""
    return table_of(
        {
            "ranks": str(row["ranks"]),
            "input of a rank": " × ".join(map(str, row["shape"])),
            "plain, µs": f"{row['seconds']['plain'] * 1e6:,.0f}",
            "synced ÷ plain": with_quartiles(row["over_plain"]["synced"]),
            "by hand ÷ plain": with_quartiles(row["over_plain"]["by hand"]),
            "collectives": str(row["collectives"]),
            "bytes": f"{row['bytes']:,}",
        }
        for row in rows
        if "shape" in row
    )


def packets_table(rows: Rows) -> str:
    """Single collectives: medians in µs."""
    return table_of(
        {"ranks": str(row["ranks"]), "bytes": f"{row['packet_bytes']:,}"}
        | {f"{name}, µs": f"{seconds * 1e6:,.0f}" for name, seconds in row["seconds"].items()}
        for row in rows
        if "packet_bytes" in row
    )
