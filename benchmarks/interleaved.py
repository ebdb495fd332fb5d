"""Times rivals in turn, round after round, so that other work of the machine meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Clocked = Callable[[], float]
# Seconds before each step where rivals have threads of their own (processes, or JAX): threads that have just
# worked wait for more by spinning, and hold a core. A step of JAX took 5.0 ms without, and 3.4 ms with it.
_PAUSE = 0.01


def rest() -> None:
    """Wait until the threads of other rivals have fallen asleep."""
    time.sleep(_PAUSE)


def rest_and_wake() -> None:
    """The same, and then wake torch's threads, which have slept too: that takes longer than a small step."""
    import torch  # here alone: a process that measures Keras on another backend needs none

    rest()
    torch.zeros(2**17).add_(1)


def clocked(step: Callable[[], object], before: Callable[[], object] = lambda: None) -> Clocked:
    """Return a call that takes `step` and returns its seconds, with what freeing its result costs.

    Args:
        step: what is timed.
        before: called first, outside the time.
    """

    def run() -> float:
        before()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return run


def repeated(step: Callable[[], object], times: int) -> Callable[[], None]:
    """Return a call that takes `step` so many times: a short step alone is a noisy one."""

    def run() -> None:
        for _ in range(times):
            step()

    return run


def interleave(rivals: Mapping[str, Clocked], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Return each rival's seconds, one per round.

    Args:
        rivals: name -> a call that takes one step and returns its seconds.
        rounds: how many are kept; every rival takes one step in each.
        warm_up: rounds before those, in which kernels are compiled and memory is first touched.
    """
    names = list(rivals)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + warm_up):
        # Rotated and reversed: each finds in the cache what each other has left there.
        order = [names[(number + place) % len(names)] for place in range(len(names))]
        for name in order if number % 2 else reversed(order):
            times[name].append(rivals[name]())
    return {name: taken[warm_up:] for name, taken in times.items()}


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Return each rival's median."""
    return {name: statistics.median(taken) for name, taken in times.items()}


def ratio(theirs: list[float], ours: list[float]) -> dict[str, Any]:
    """Return the median of the ratios theirs / ours, round by round, and their quartiles."""
    ratios = sorted(their / own for their, own in zip(theirs, ours, strict=True))
    return {
        "median": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
    }
