"""Cost of `monitor`: training steps of ResNet-18 without it, with it, and those that it observes."""

from __future__ import annotations

import statistics

import batchnorm

from .interleaved import Clocked, clocked, interleave, medians, ratio, rest_and_wake
from .progress import progress
from .step_time import StepCase, steps
from .tables import Row, Rows, table_of, with_quartiles

CASES = (StepCase("ResNet-18", 16, 128),)
QUICK_CASES = (StepCase("ResNet-18", 2, 32),)
ROUNDS, QUICK_ROUNDS = 9, 2
EVERY = 100
GOAL = 0.02  # of a step, at every=100


def measure(quick: bool = False) -> Rows:
    """Return a row per case and norm: medians in seconds, and ratios to the step without it."""
    found = []
    for case in progress(QUICK_CASES if quick else CASES, "monitored training steps"):
        for norm in ("stock", "ours"):
            found.append(_measured(case, norm, QUICK_ROUNDS if quick else ROUNDS))
    return found


def _measured(case: StepCase, norm: str, rounds: int) -> Row:
    """Return the row of one network: each of the rivals is a network of its own, from the same weights."""
    plain, unobserved, observed = (steps(case)[norm] for _ in range(3))
    with (
        batchnorm.monitor(unobserved.model, lambda *_: None, every=10**9),
        batchnorm.monitor(observed.model, lambda *_: None, every=1),
    ):
        unobserved()  # step 0, which is observed
        taken = {"without": plain, "between": unobserved, "observed": observed}
        rivals: dict[str, Clocked] = {name: clocked(step, rest_and_wake) for name, step in taken.items()}
        times = interleave(rivals, rounds)
    between, seen = ratio(times["between"], times["without"]), ratio(times["observed"], times["without"])
    costs = [
        ((EVERY - 1) * b + o) / EVERY / w - 1
        for b, o, w in zip(times["between"], times["observed"], times["without"], strict=True)
    ]
    return {
        "network": case.network,
        "norm": norm,
        "batch": case.batch,
        "side": case.side,
        "seconds": medians(times),
        "ratios": {"between / without": between, "observed / without": seen},
        # Steps between do nothing but count, which no clock resolves beside a step: `whole` has their noise.
        "cost": {"observed": (seen["median"] - 1) / EVERY, "whole": statistics.median(costs)},
        "every": EVERY,
    }


def monitor_table(rows: Rows) -> str:
    """Return the table of the costs, shares of a step."""
    return table_of(
        {
            "network": f"{row['network']}, {row['norm']}, {row['batch']} × 3 × {row['side']}²",
            "a step, ms": f"{row['seconds']['without'] * 1e3:.0f}",
            "a step between ÷ without": with_quartiles(row["ratios"]["between / without"]),
            "a step that is observed ÷ without": with_quartiles(row["ratios"]["observed / without"]),
            "cost of observing each 100th": f"{100 * row['cost']['observed']:.2f} %",
            "goal": f"{100 * GOAL:.0f} %",
        }
        for row in rows
    )
