"""Measures policies, masks and guards: a training step of a layer, over that with `Batch()`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import batchnorm

from .goals import Finding, findings_table
from .interleaved import clocked, interleave, medians, ratio, repeated
from .layouts import memory_format
from .progress import progress
from .tables import Row, Rows, table_of

ROUNDS, QUICK_ROUNDS = 41, 3
SECONDS = 2e-3  # a round repeats a step for about as long


class Case(NamedTuple):
    """An input of the layer."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        sizes = " × ".join(map(str, self.shape))
        return f"{sizes}, {self.layout}, {str(self.dtype).removeprefix('torch.')}"


CASES = (
    Case((32, 64, 56, 56)),
    Case((32, 256, 14, 14)),
    Case((32, 64, 56, 56), "channels-last"),
    Case((32, 256, 14, 14), "channels-last"),
    Case((32, 64, 56, 56), dtype=torch.bfloat16),
    Case((4096, 1024)),
    Case((128, 256)),
)
QUICK_CASES = (Case((8, 16, 8, 8)), Case((64, 32)))

_OPEN = {"r_steps": (0, 0), "d_steps": (0, 0)}
# What is compared, by name: options of the layer, its mode, and the fraction of positions that a mask leaves.
VARIANTS: dict[str, tuple[dict[str, Any], bool, float | None]] = {
    "Batch()": ({}, True, None),
    "Ghost(8)": ({"statistics": batchnorm.Ghost(8)}, True, None),
    "Ghost(16)": ({"statistics": batchnorm.Ghost(16)}, True, None),
    "Ghost(16, sequential)": ({"statistics": batchnorm.Ghost(16, sequential=True)}, True, None),
    "Renorm()": ({"statistics": batchnorm.Renorm(**_OPEN)}, True, None),
    "Synced(), one rank": ({"statistics": batchnorm.Synced()}, True, None),
    "mask, 2/3 of the positions": ({}, True, 0.67),
    "nonfinite='skip'": ({"nonfinite": "skip"}, True, None),
    "nonfinite='raise'": ({"nonfinite": "raise"}, True, None),
    "Running(), training": ({"statistics": batchnorm.Running()}, True, None),
    "evaluation": ({}, False, None),
    "Adapted(16), evaluation": ({"statistics": batchnorm.Adapted(16)}, False, None),
}


def measure(quick: bool = False) -> Rows:
    """Return a row per case: medians in seconds, and times over those of `Batch()` in training."""
    return [_row(case, quick) for case in progress(QUICK_CASES if quick else CASES, "policies")]


def _row(case: Case, quick: bool) -> Row:
    steps = {name: _step(case, *variant) for name, variant in VARIANTS.items()}
    for step in steps.values():
        step()
    once = clocked(steps["Batch()"])
    repeats = max(1, int(SECONDS / min(once() for _ in range(5))))
    clocks = {name: clocked(repeated(step, repeats)) for name, step in steps.items()}
    times = interleave(clocks, QUICK_ROUNDS if quick else ROUNDS)
    return {
        "shape": list(case.shape),
        "layout": case.layout,
        "dtype": str(case.dtype).removeprefix("torch."),
        "seconds": {name: median / repeats for name, median in medians(times).items()},
        "over_batch": {
            name: ratio(taken, times["Batch()"]) for name, taken in times.items() if name != "Batch()"
        },
    }


def _step(case: Case, options: dict[str, Any], training: bool, counted: float | None) -> Callable[[], None]:
    kind = batchnorm.BatchNorm2d if len(case.shape) == 4 else batchnorm.BatchNorm1d
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = kind(case.shape[1], activation="relu", **options).train(training)
        layout = memory_format(case.layout, len(case.shape))
        x, dy = ((torch.randn(case.shape) + 0.5).to(case.dtype, memory_format=layout) for _ in range(2))
        mask = None
        if counted is not None:
            mask = torch.rand(case.shape[0], *case.shape[2:]) < counted
    x.requires_grad_()

    def step() -> None:
        layer(x, mask=mask).backward(dy)
        x.grad = None

    return step


def policies_table(rows: Rows) -> str:
    """Times over those of `Batch()`, a column per case."""

    def shown(row: Row, name: str) -> str:
        if name == "Batch()":
            return f"{row['seconds'][name] * 1e6:,.0f} µs"
        return f"{row['over_batch'][name]['median']:.2f}"

    cases = [Case(tuple(row["shape"]), row["layout"], getattr(torch, row["dtype"])) for row in rows]
    return table_of(
        {"forward and backward": f"`{name}`"}
        | {str(case): shown(row, name) for case, row in zip(cases, rows, strict=True)}
        for name in VARIANTS
    )


GHOST_GOAL, FROZEN_GOAL = 1.15, 1.02


def goals_table(rows: Rows) -> str:
    """The goals of policies, and what was found."""
    found = [
        _finding(f"{name} ÷ Batch()", GHOST_GOAL, [r["over_batch"][name]["median"] for r in rows], max)
        for name in ("Ghost(8)", "Ghost(16)")
    ]
    frozen = [
        row["over_batch"]["Running(), training"]["median"] / row["over_batch"]["evaluation"]["median"]
        for row in rows
    ]
    what = "Running() in training ÷ evaluation"
    return findings_table([*found, _finding(what, FROZEN_GOAL, frozen, statistics.median)])


def _finding(what: str, goal: float, ratios: list[float], judged: Callable[[list[float]], float]) -> Finding:
    """Return the median and the worst; the goal holds for one of them."""
    asked = f"{'every' if judged is max else 'median'} ≤ {goal:g}"
    return Finding(what, asked, statistics.median(ratios), max(ratios), len(ratios), judged(ratios) <= goal)
