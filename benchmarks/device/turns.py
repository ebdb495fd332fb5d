"""Times rivals in turn for about a number of seconds; a rival that fails drops out, with its reason."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from benchmarks.interleaved import Clocked, interleave

LEAST_ROUNDS = 5
_LONGEST = 200  # characters of an error that are kept
Built = TypeVar("Built")


class _RivalError(Exception):
    """A rival failed; the message says how."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def reason(error: BaseException) -> str:
    """Return in one line what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_LONGEST]


def built(builds: Mapping[str, Callable[[], Built]], failed: dict[str, str]) -> dict[str, Built]:
    """Return the result of each call; a call that raises is in `failed`, with the reason."""
    found = {}
    for name, build in builds.items():
        try:
            found[name] = build()
        except Exception as error:
            failed[name] = reason(error)
        if name in failed:  # behind the error, whose frames hold tensors
            free()
    return found


def take_turns(
    rivals: Mapping[str, Clocked], seconds: float, most: int, failed: dict[str, str]
) -> dict[str, list[float]]:
    """Return each rival's seconds, one per round; a rival that fails is in `failed`, with the reason.

    Args:
        rivals: name -> a call that takes one step and returns its seconds.
        seconds: that the rounds may take, about; there are LEAST_ROUNDS all the same.
        most: rounds, at most.
        failed: is added to.
    """
    left = {name: _named(name, step) for name, step in rivals.items() if name not in failed}
    while left:
        try:
            interleave(left, 1, warm_up=1)  # compiles
            start = time.perf_counter()
            interleave(left, 1, warm_up=0)
            taken = max(time.perf_counter() - start, 1e-9)
            return interleave(left, max(LEAST_ROUNDS, min(most, int(seconds / taken))), warm_up=0)
        except _RivalError as error:
            failed[error.name] = str(error)
            del left[error.name]
            free()
    return {}


def _named(name: str, step: Clocked) -> Clocked:
    def run() -> float:
        try:
            return step()
        except Exception as error:
            message = reason(error)
        raise _RivalError(name, message)  # without the error, whose frames hold tensors

    return run


def free() -> None:
    """Free unreferenced memory, that of the device too."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
