"""Time of one norm → ReLU, forward and backward, ours against stock eager, interleaved in one process.

The floor is the time of the tensor passes that cannot be avoided, by a copy's: 5 where a channel lies side by
side and is read again from the cache (x, y; x, dy, dx), 8 where it does not (x, x, y; x, dy, x, dy, dx).
"""

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
    (4096, 1024),
    (32, 64, 28, 28),
    (32, 256, 14, 14),
    (32, 512, 7, 7),
    (32, 1024, 14, 14),
    (32, 64, 56, 56),
    (32, 256, 56, 56),
)
DTYPES = (torch.float32, torch.bfloat16)
REPEATS, QUICK_REPEATS = 21, 5
NORMS = {2: (nn.BatchNorm1d, batchnorm.BatchNorm1d), 4: (nn.BatchNorm2d, batchnorm.BatchNorm2d)}


def measure(quick: bool = False) -> list[dict[str, Any]]:
    """Return one row per shape and layout: medians in seconds, and the ratio stock / ours, pair by pair."""
    rows = []
    for dtype in DTYPES:
        for shape in SHAPES[:: 3 if quick else 1]:
            formats = [torch.contiguous_format] + ([torch.channels_last] if len(shape) == 4 else [])
            for memory_format in formats:
                rows.append(_row(shape, memory_format, dtype, QUICK_REPEATS if quick else REPEATS))
    return rows


def _row(
    shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(dtype, memory_format=memory_format) for _ in range(2))
    x.requires_grad_()
    target = torch.empty_like(dy)
    last = memory_format == torch.channels_last or len(shape) == 2
    stock, ours = NORMS[len(shape)]
    rivals = [
        nn.Sequential(stock(shape[1]), nn.ReLU()),
        ours(shape[1], activation="relu"),
    ]
    steps = [*(_step(model, x, dy) for model in rivals), lambda: target.copy_(dy)]
    times: list[list[float]] = [[], [], []]
    for number in range(repeats + 2):
        order = [(number + place) % len(steps) for place in range(len(steps))]  # each follows each other
        for rival in order if number % 2 else reversed(order):
            start = time.perf_counter()
            steps[rival]()
            times[rival].append(time.perf_counter() - start)
    stock_times, our_times, copies = (taken[2:] for taken in times)
    pairs = sorted(theirs / own for theirs, own in zip(stock_times, our_times, strict=True))
    floor = statistics.median(copies) / 2 * (8 if last else 5)
    return {
        "shape": list(shape),
        "layout": "channels-last" if last else "contiguous",
        "dtype": str(dtype).removeprefix("torch."),
        "stock_seconds": statistics.median(stock_times),
        "seconds": statistics.median(our_times),
        "stock_over_ours": statistics.median(pairs),
        "stock_over_ours_quartiles": [pairs[len(pairs) // 4], pairs[3 * len(pairs) // 4]],
        "over_floor": statistics.median(our_times) / floor,
    }


def _step(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).backward(dy)

    return step
