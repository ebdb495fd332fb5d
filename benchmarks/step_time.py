"""Time of whole training steps, stock's and ours of the same network, with and without `reuse_memory()`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from . import networks
from .interleaved import Clocked, clocked, interleave, medians, ratio, rest_and_wake
from .layouts import memory_format
from .progress import progress
from .reusing_process import REUSING, ReusingProcess
from .tables import Row, Rows
from .training_step import TrainingStep

ROUNDS, QUICK_ROUNDS = 9, 2
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


def measure(quick: bool = False) -> Rows:
    """Return a row per network: medians in seconds, ratios round by round, and how well the losses agree."""
    found = []
    with ReusingProcess(steps) as other:
        for case in progress(QUICK_CASES if quick else CASES, "training steps"):
            taken = steps(case)
            difference = losses_differ(case, {name: step().item() for name, step in taken.items()})
            rivals: dict[str, Clocked] = {name: clocked(step, rest_and_wake) for name, step in taken.items()}
            rivals |= {name + REUSING: step for name, step in other.prepare(case).items()}
            times = interleave(rivals, QUICK_ROUNDS if quick else ROUNDS, warm_up=1)
            found.append(_row(case, times, difference))
    return found


def steps(case: StepCase) -> dict[str, TrainingStep]:
    """Return the step with each norm, from the same weights and on the same images."""
    return {name: _step(case, norm) for name, norm in networks.NORMS.items()}


def _step(case: StepCase, norm: networks.Norm) -> TrainingStep:
    layout = memory_format(case.layout)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = networks.NETWORKS[case.network](norm)
        images = torch.randn(case.batch, 3, case.side, case.side)
        labels = torch.randint(networks.CLASSES, (case.batch,))
    model.to(memory_format=layout)  # type: ignore[call-overload]
    return TrainingStep(model, images.to(memory_format=layout), labels)


def losses_differ(case: object, losses: dict[str, float]) -> float:
    """Return by how much the first losses differ, relative to stock's; too much is the benchmark's error."""
    stock = losses["stock"]
    difference = max(abs(loss - stock) / abs(stock) for loss in losses.values())
    if not (math.isfinite(difference) and difference <= AGREEMENT):
        raise RuntimeError(f"{case} is not the same network with each norm: its first losses are {losses}")
    return difference


def _row(case: StepCase, times: dict[str, list[float]], difference: float) -> Row:
    pairs = (("stock", "ours"), ("stock" + REUSING, "ours" + REUSING), ("stock", "ours" + REUSING))
    return {
        **asdict(case),
        "seconds": medians(times),
        "ratios": {f"{theirs} / {own}": ratio(times[theirs], times[own]) for theirs, own in pairs},
        "losses_differ": difference,
    }
