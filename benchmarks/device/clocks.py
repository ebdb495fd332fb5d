"""Seconds of a step on a device: of the kernels alone, or of everything."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from benchmarks.interleaved import Clocked, clocked

Step = Callable[[], object]
# The device is kept busy for so long before the kernels of a layer, while the host queues them: they then
# follow each other as in a training step, where convolutions keep the queue full.
HEAD_START = 2e-3
_CALIBRATION = 20_000_000  # cycles, some 10 ms


class Clock(Protocol):
    """Times steps of layers and of training."""

    def of_layer(self, step: Step, host: list[float]) -> Clocked:
        """Return a call for the seconds of a step's kernels; it adds those of the host to `host`."""

    def of_training(self, step: Step) -> Clocked:
        """Return a call for the seconds of a step, from its call to its last kernel."""


class CpuClock:
    """`time.perf_counter`. There is no queue, and caches are as they are."""

    def of_layer(self, step: Step, host: list[float]) -> Clocked:
        """Return a call for a step's seconds: all are the host's."""
        whole = clocked(step)

        def run() -> float:
            host.append(whole())
            return host[-1]

        return run

    def of_training(self, step: Step) -> Clocked:
        """Return the same."""
        return clocked(step)


class CudaClock:
    """Events of the device. A layer starts with a full queue and an L2 cache that holds nothing of it."""

    def __init__(self) -> None:
        level_two = torch.cuda.get_device_properties().L2_cache_size
        self._junk = torch.empty(4 * level_two, dtype=torch.uint8, device="cuda")
        self._cycles = self._of(HEAD_START)

    @staticmethod
    def _of(seconds: float) -> int:
        """Return in how many cycles the device waits for so long."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first call loads the kernel, and wakes the clocks
            start.record()
            torch.cuda._sleep(_CALIBRATION)
            end.record()
            end.synchronize()
        return int(_CALIBRATION * seconds / (start.elapsed_time(end) / 1e3))

    def of_layer(self, step: Step, host: list[float]) -> Clocked:
        """Return a call for the seconds of a step's kernels."""

        def before() -> None:
            self._junk.zero_()
            torch.cuda._sleep(self._cycles)

        return self._between_events(step, host, before)

    def of_training(self, step: Step) -> Clocked:
        """Return a call for the seconds of a step, on an idle device."""
        return self._between_events(step, [], lambda: None)

    @staticmethod
    def _between_events(step: Step, host: list[float], before: Step) -> Clocked:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def run() -> float:
            before()
            start.record()
            called = time.perf_counter()
            step()
            host.append(time.perf_counter() - called)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return run


def clock(device: str) -> Clock:
    """Return the clock of `cpu` or `cuda`."""
    return CudaClock() if device == "cuda" else CpuClock()
