"""Time of whole training steps, stock's and ours of the same network, with and without `reuse_memory()`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from . import networks
from .interleaved import Clocked, clocked, interleave, ratio, rest_and_wake
from .progress import progress
from .reusing_process import REUSING, ReusingProcess

ROUNDS, QUICK_ROUNDS = 9, 2
NORMS: dict[str, networks.Norm] = {"stock": networks.stock, "ours": networks.ours}
AGREEMENT = 1e-4  # of the first losses, relative: float32, through 121 norms


@dataclass(frozen=True)
class StepCase:
    """A training step: forward, cross-entropy, backward, SGD with momentum."""

    network: str
    batch: int
    side: int
    layout: str = "contiguous"


# Steps of 0.3 to 1.5 s on two cores.
CASES = (
    StepCase("ResNet-18", 16, 128),
    StepCase("ResNet-50", 8, 128),
    StepCase("ResNet-50", 8, 128, "channels-last"),
    StepCase("MobileNetV2", 16, 128),
    StepCase("MobileNetV2", 16, 128, "channels-last"),
    StepCase("DenseNet-121", 8, 128),
)
QUICK_CASES = (StepCase("MobileNetV2", 4, 64),)
Rows = list[dict[str, Any]]


def measure(quick: bool = False) -> Rows:
    """Return a row per network: medians in seconds, ratios round by round, and how well the losses agree."""
    found = []
    with ReusingProcess(steps) as other:
        for case in progress(QUICK_CASES if quick else CASES, "training steps"):
            taken = steps(case)
            difference = losses_differ(case, {name: step() for name, step in taken.items()})
            rivals: dict[str, Clocked] = {name: clocked(step, rest_and_wake) for name, step in taken.items()}
            rivals |= {name + REUSING: step for name, step in other.prepare(case).items()}
            times = interleave(rivals, QUICK_ROUNDS if quick else ROUNDS, warm_up=1)
            found.append(_row(case, times, difference))
    return found


def steps(case: StepCase) -> dict[str, Callable[[], float]]:
    """Return a step with each norm, from the same weights and on the same images; it returns the loss."""
    return {name: _step(case, norm) for name, norm in NORMS.items()}


def _step(case: StepCase, norm: networks.Norm) -> Callable[[], float]:
    memory_format = torch.channels_last if case.layout == "channels-last" else torch.contiguous_format
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = networks.NETWORKS[case.network](norm)
        images = torch.randn(case.batch, 3, case.side, case.side)
        labels = torch.randint(networks.CLASSES, (case.batch,))
    model.to(memory_format=memory_format)  # type: ignore[call-overload]
    images = images.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        loss = F.cross_entropy(model(images), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def losses_differ(case: object, losses: dict[str, float]) -> float:
    """Return by how much the first losses differ, relative to stock's; too much is the benchmark's error."""
    stock = losses["stock"]
    difference = max(abs(loss - stock) / abs(stock) for loss in losses.values())
    if not (math.isfinite(difference) and difference <= AGREEMENT):
        raise RuntimeError(f"{case} is not the same network with each norm: its first losses are {losses}")
    return difference


def _row(case: StepCase, times: dict[str, list[float]], difference: float) -> dict[str, Any]:
    pairs = (("stock", "ours"), ("stock" + REUSING, "ours" + REUSING), ("stock", "ours" + REUSING))
    return {
        "network": case.network,
        "batch": case.batch,
        "side": case.side,
        "layout": case.layout,
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "ratios": {f"{theirs} / {own}": ratio(times[theirs], times[own]) for theirs, own in pairs},
        "losses_differ": difference,
    }
