"""Measures memory held between forward and backward, and the time of a step: `lean` and its rivals."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .interleaved import clocked, interleave, medians, ratio
from .lean_variants import VARIANTS, LeanCase
from .progress import progress
from .resident import resident_bytes
from .tables import Row, Rows
from .training_step import TrainingStep

NETWORKS = (
    "VGG-11-BN",
    "ResNet-50",
    "pre-activation ResNet-50",
    "MobileNetV2",
    "EfficientNet-B0",
    "DenseNet-121",
    "U-Net",
)
CASES = tuple(LeanCase(network, 16, 128) for network in NETWORKS)
QUICK_CASES = (LeanCase("MobileNetV2", 4, 64),)
ROUNDS, QUICK_ROUNDS = 7, 1
TIMES = 3  # that memory is looked at
_RATIOS = (("lean", "ours"), *((name, "stock") for name in ("ours", "lean", "checkpoint", "selective")))


def measure(quick: bool = False) -> Rows:
    """Return a row per network: bytes held, seconds of a step, and whether gradients are the same."""
    return [
        measured(case, QUICK_ROUNDS if quick else ROUNDS)
        for case in progress(QUICK_CASES if quick else CASES, "networks")
    ]


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measured(case: LeanCase, rounds: int, apart: Callable[..., Any] = in_new_process) -> Row:
    """Return the row of a network; `apart` calls what looks at memory."""
    held = {name: apart(bytes_held, case, name) for name in VARIANTS}
    same = _are_gradients_same(VARIANTS["ours"](case), VARIANTS["lean"](case))
    steps = {name: build(case) for name, build in VARIANTS.items()}
    times = interleave({name: clocked(step) for name, step in steps.items()}, rounds, warm_up=1)
    return {
        **asdict(case),
        "bytes_held": {name: found["resident"] for name, found in held.items()},
        "bytes_allocated": {name: found["allocated"] for name, found in held.items()},
        "seconds": medians(times),
        "ratios": {f"{own} / {theirs}": ratio(times[own], times[theirs]) for own, theirs in _RATIOS},
        "gradients_identical": same,
    }


def bytes_held(case: LeanCase, variant: str) -> dict[str, float]:
    """Return how many bytes a forward leaves, after a first step: medians.

    Returns:
        resident: growth of the process's resident memory (Linux), from before the forward to behind it.
        allocated: bytes of the tensors that were allocated meanwhile and are there still.
    """
    step = VARIANTS[variant](case)
    torch.autograd.backward(step.forward())
    resident = statistics.median(_growth(step) for _ in range(TIMES))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = step.forward()
    del loss
    return {"resident": resident, "allocated": sum(e.self_cpu_memory_usage for e in seen.key_averages())}


def _growth(step: TrainingStep) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes()
    loss = step.forward()
    ctypes.CDLL(None).malloc_trim(0)
    grown = resident_bytes() - before
    torch.autograd.backward(loss)
    return grown


def _are_gradients_same(*steps: TrainingStep) -> bool:
    found = []
    for step in steps:
        torch.autograd.backward(step.forward())
        found.append([parameter.grad for parameter in step.model.parameters()])
    return all(map(torch.equal, *found))
