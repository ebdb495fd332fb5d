"""Whole training steps on a device: images/s and memory of stock, ours, fused, lean and compiled networks."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
from benchmarks import networks
from benchmarks.interleaved import ratio
from benchmarks.tables import Row
from benchmarks.training_step import TrainingStep

from .clocks import clock
from .turns import built, free, take_turns

MOST_ROUNDS = 25
# Largest |logits - stock's| / |stock's| of the first forward: bfloat16, through 53 norms. It was 0.05 in
# ResNet-18 on 8 images of 32 x 32 pixels; what has nothing to do with stock's is 1 or more away.
AGREEMENT = 0.25
EAGER = ("stock", "ours", "fused", "lean")
_NETWORKS = ("ResNet-50", "MobileNetV2", "EfficientNet-B0")
_BATCH_AND_SIDE = {"cuda": (256, 224), "cpu": (8, 128)}
Around = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class StepCase:
    """Forward under bfloat16 autocast, cross-entropy, backward, SGD with momentum; channels-last."""

    network: str
    batch: int
    side: int
    variants: tuple[str, ...]
    device: str = "cuda"
    seconds: float = 12.0  # that its rounds may take, about

    def fields(self) -> dict[str, object]:
        """Return what identifies the case in a result file."""
        return {
            "network": self.network,
            "batch": self.batch,
            "side": self.side,
            "layout": "channels-last",
            "dtype": "bfloat16 autocast",
            "asked": list(self.variants),
        }


def cases(device: str, quick: bool = False) -> list[StepCase]:
    """Return the cases, most important first; a compiled network stands alone beside stock."""
    if quick:
        return [StepCase("ResNet-18", 8, 32, EAGER, device, 0.5)]
    groups = (EAGER, ("stock", "compiled"), ("stock", "compiled-ours"))
    eager, *compiled = (
        [StepCase(network, *_BATCH_AND_SIDE[device], group, device) for network in _NETWORKS]
        for group in groups
    )
    return eager + [case for pair in zip(*compiled, strict=True) for case in pair]


def _step(
    case: StepCase, prepare: Callable[[nn.Module], nn.Module], around: Around = nullcontext
) -> TrainingStep:
    """Return a variant of a case's network; the same weights and images for each."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = networks.NETWORKS[case.network](networks.stock)
        images = torch.randn(case.batch, 3, case.side, case.side)
        labels = torch.randint(networks.CLASSES, (case.batch,)).to(case.device)
    model.to(device=case.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @contextlib.contextmanager
    def autocast() -> Iterator[None]:
        with torch.autocast(case.device, torch.bfloat16), around():
            yield

    images = images.to(case.device, memory_format=torch.channels_last)
    return TrainingStep(prepare(model), images, labels, autocast)


def _fused(model: nn.Module) -> nn.Module:
    return batchnorm.fuse(batchnorm.convert(model))


def _compile(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    found: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return found


VARIANTS: dict[str, Callable[[StepCase], TrainingStep]] = {
    "stock": lambda case: _step(case, lambda model: model),
    "ours": lambda case: _step(case, batchnorm.convert),
    "fused": lambda case: _step(case, _fused),
    "lean": lambda case: _step(case, _fused, batchnorm.lean),
    "compiled": lambda case: _step(case, _compile),
    "compiled-ours": lambda case: _step(case, lambda model: _compile(_fused(model))),
}


def measured(case: StepCase) -> Row:
    """Return a case's row; a variant that fails has its reason there in place of its time."""
    failed: dict[str, str] = {}
    if case.device == "cuda":
        torch.backends.cudnn.benchmark = True  # convolutions as fast as they come
    steps = built({name: functools.partial(VARIANTS[name], case) for name in case.variants}, failed)
    differs = _check_agreement(
        built({name: functools.partial(_first_logits, step) for name, step in steps.items()}, failed), failed
    )
    left = {name: step for name, step in steps.items() if name not in failed}
    memory = built({name: functools.partial(_memory, case, step) for name, step in left.items()}, failed)
    watch = clock(case.device)
    times = take_turns(
        {name: watch.of_training(step) for name, step in left.items()}, case.seconds, MOST_ROUNDS, failed
    )
    return case.fields() | {
        "rounds": len(next(iter(times.values()), [])),
        "variants": {name: _variant(case, taken, memory[name]) for name, taken in times.items()},
        "ratios": {
            f"stock / {name}": ratio(times["stock"], taken)
            for name, taken in times.items()
            if "stock" in times and name != "stock"
        },
        "differs": differs,
        "failed": failed,
    }


def _first_logits(step: TrainingStep) -> Tensor:
    """Take a first step, for what is only done once; return what its network put out."""
    found = step.logits()
    step.finish(step.loss(found))
    return found.detach().float()


def _check_agreement(logits: dict[str, Tensor], failed: dict[str, str]) -> dict[str, float]:
    """Return by how much each variant differs from stock; one that does too much has failed."""
    if "stock" not in logits:
        return {}
    stock = logits["stock"]
    found = {name: ((own - stock).norm() / stock.norm()).item() for name, own in logits.items()}
    for name, differs in found.items():
        if not differs <= AGREEMENT:  # NaN too
            failed[name] = f"its logits differ from stock's by {differs:.2g}, and may by {AGREEMENT:g}"
    return found


def _memory(case: StepCase, step: TrainingStep) -> dict[str, int] | None:
    """Return bytes of tensors above those that were there before a step; no one counts them on a CPU.

    Returns:
        held: behind the forward, for the backward.
        peak: the most within the step; gradients and what convolutions work in are among it.
        before: weights, momenta and images, of all variants of the case.
    """
    if case.device == "cpu":
        return None
    free()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = step.forward()
    held = torch.cuda.memory_allocated() - before
    step.finish(loss)
    return {"held": held, "peak": torch.cuda.max_memory_allocated() - before, "before": before}


def _variant(case: StepCase, taken: list[float], memory: dict[str, int] | None) -> dict[str, Any]:
    seconds = statistics.median(taken)
    return {"seconds": seconds, "images_per_second": case.batch / seconds, "bytes": memory}
