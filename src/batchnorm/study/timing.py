"""Seconds per training step of each arm, side by side in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from .arms import Arm, parse_arm
from .options import display_name
from .run_form import ArmTiming
from .tasks import TimingTask
from .user_code import naming_the_line, source_of

_BLOCKS = 9
_STEPS_PER_BLOCK = 10
_WARM_UP_STEPS = 5
_SECONDS_PER_BLOCK = 0.1  # slow networks take fewer steps per block, so that timing stays a matter of seconds

Step = Callable[[], None]


def in_turns(task: TimingTask, step_of: Callable[[Arm], Step]) -> dict[str, ArmTiming]:
    """Time every arm of a network: `{arm: {"seconds_per_step": [one median per block]}}`.

    A step is forward, loss, backward and update, at the batch size of training. Arms take turns block by
    block, so that whatever else the machine does falls on all of them; a block counts with its median step.

    Args:
        task: the network and its arms.
        step_of: builds the network for an arm, and returns what takes a training step and waits for its end.
    """
    source = source_of(task.network)
    seconds: dict[str, list[float]] = {arm: [] for arm in task.arms}
    steps: dict[str, Step] = {}
    counts: dict[str, int] = {}
    for name in task.arms:
        with naming_the_line(f"network {display_name(task.network)}, arm {name}", source):
            steps[name] = step_of(parse_arm(name))
            slowest = statistics.median(_seconds_of(steps[name]) for _ in range(_WARM_UP_STEPS))
        counts[name] = max(3, min(_STEPS_PER_BLOCK, int(_SECONDS_PER_BLOCK / slowest)))
    for _ in range(_BLOCKS):
        for name, step in steps.items():
            seconds[name].append(statistics.median(_seconds_of(step) for _ in range(counts[name])))
    return {name: {"seconds_per_step": values} for name, values in seconds.items()}


def _seconds_of(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
