"""Seconds per training step of each arm, side by side in one process."""

from __future__ import annotations

import statistics
import time

import torch

from .arms import parse_arm
from .networks import build_network
from .options import display_name
from .tasks import TimingTask
from .train_torch import Learner, TensorData
from .user_code import naming_the_line, source_of

_BLOCKS = 9
_STEPS_PER_BLOCK = 10
_WARM_UP_STEPS = 5
_SECONDS_PER_BLOCK = 0.1  # slow networks take fewer steps per block, so that timing stays a matter of seconds


def measure(task: TimingTask, data: TensorData) -> dict[str, dict[str, list[float]]]:
    """Time every arm of a network: `{arm: {"seconds_per_step": [one median per block]}}`.

    A step is forward, loss, backward and update, at the batch size of training. Arms take turns block by
    block, so that whatever else the machine does falls on all of them; a block counts with its median step.
    The caller's random state is as before.
    """
    x, y = data.x_train[: task.batch_size], data.y_train[: task.batch_size]
    source = source_of(task.network)
    seconds: dict[str, list[float]] = {arm: [] for arm in task.arms}
    with torch.random.fork_rng(devices=[]):
        learners, steps = {}, {}
        for name in task.arms:
            with naming_the_line(f"network {display_name(task.network)}, arm {name}", source):
                arm = parse_arm(name)
                model = build_network(task.network, arm, data.input_shape, data.classes, seed=0)
                learners[name] = Learner(model, arm, learning_rate=1e-3)
                slowest = statistics.median(
                    _step_seconds(learners[name], x, y) for _ in range(_WARM_UP_STEPS)
                )
            steps[name] = max(3, min(_STEPS_PER_BLOCK, int(_SECONDS_PER_BLOCK / slowest)))
        for _ in range(_BLOCKS):
            for name, learner in learners.items():
                block = [_step_seconds(learner, x, y) for _ in range(steps[name])]
                seconds[name].append(statistics.median(block))
    return {name: {"seconds_per_step": values} for name, values in seconds.items()}


def _step_seconds(learner: Learner, x: torch.Tensor, y: torch.Tensor) -> float:
    start = time.perf_counter()
    learner.backward(x, y)
    learner.update()
    return time.perf_counter() - start
