"""Time of one norm → ReLU, forward and backward, ours against stock eager, interleaved in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import batchnorm

SHAPES = (
    (32, 64),
    (256, 512),
    (32, 64, 28, 28),
    (32, 256, 14, 14),
    (32, 64, 56, 56),
)
REPEATS, QUICK_REPEATS = 21, 5
NORMS = {2: (nn.BatchNorm1d, batchnorm.BatchNorm1d), 4: (nn.BatchNorm2d, batchnorm.BatchNorm2d)}


def measure(quick: bool = False) -> list[dict[str, Any]]:
    """Return one row per shape and layout: medians in seconds, and the ratio stock / ours, pair by pair."""
    rows = []
    for shape in SHAPES:
        formats = [torch.contiguous_format] + ([torch.channels_last] if len(shape) == 4 else [])
        for memory_format in formats:
            rows.append(_row(shape, memory_format, QUICK_REPEATS if quick else REPEATS))
    return rows


def _row(shape: tuple[int, ...], memory_format: torch.memory_format, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(memory_format=memory_format) for _ in range(2))
    x.requires_grad_()
    stock, ours = NORMS[len(shape)]
    rivals = [
        nn.Sequential(stock(shape[1]), nn.ReLU()),
        ours(shape[1], activation="relu"),
    ]
    steps = [_step(model, x, dy) for model in rivals]
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 2):
        for step, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    pairs = [stock_time / our_time for stock_time, our_time in zip(*(t[2:] for t in times), strict=True)]
    return {
        "shape": list(shape),
        "layout": "channels-last"
        if memory_format == torch.channels_last or len(shape) == 2
        else "contiguous",
        "stock_seconds": statistics.median(times[0][2:]),
        "seconds": statistics.median(times[1][2:]),
        "stock_over_ours": statistics.median(pairs),
        "stock_over_ours_range": [min(pairs), max(pairs)],
    }


def _step(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).backward(dy)

    return step
