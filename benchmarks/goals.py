"""What was asked of the layers' speed, next to what was measured; a missed goal stays in the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .layer_cases import HUGE_BYTES, LARGE
from .reusing_process import REUSING

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """A goal and what came of it.

    Attributes:
        what: which rows, and which of their figures.
        asked: the goal, as text.
        found: geometric mean of ratios, or median of multiples of the floor.
        worst: the least ratio, or the largest multiple.
        number: of rows.
        reached: whether `found` reaches the goal.
    """

    what: str
    asked: str
    found: float
    worst: float
    number: int
    reached: bool


def layer_findings(rows: Rows) -> list[Finding]:
    """Return the goals of single layers, with the default allocator."""
    large = [row for row in rows if row["values"] > LARGE]
    main = _of(large, "norm-relu", "float32")
    contiguous = [row for row in main if row["layout"] == "contiguous"]
    evaluation = [row for row in rows if row["operation"].startswith("eval")]
    tiny = [row for row in rows if row["shape"] == [32, 64] and row["dtype"] == "float32"]
    return [
        *_ratios("norm → ReLU, float32, contiguous, over 2¹⁸ values: stock ÷ ours", 3.5, contiguous),
        *_ratios(
            "the same, channels-last and [N, C]",
            2.2,
            (row for row in main if row["layout"] == "channels-last"),
        ),
        *_least("norm → ReLU, float32, any over 2¹⁸ values: the least stock ÷ ours", 1.4, main),
        *_ratios(
            "norm → ReLU, bfloat16, contiguous, over 2¹⁸ values: stock ÷ ours",
            3.0,
            _contiguous(_of(large, "norm-relu", "bfloat16")),
        ),
        *_ratios(
            "norm → add → ReLU, float32, contiguous, over 2¹⁸ values: stock ÷ ours",
            3.0,
            _contiguous(_of(large, "norm-add-relu", "float32")),
        ),
        *_least("evaluation, forward: the least stock ÷ ours", 1.0, evaluation),
        *_floors(
            "evaluation, forward, over 2¹⁸ values: ours ÷ a copy",
            1.2,
            (row for row in evaluation if row["values"] > LARGE),
        ),
        *_ratios("norm → ReLU, float32, (32, 64): stock ÷ ours", 0.9, _of(tiny, "norm-relu", "float32")),
    ]


def reuse_memory_findings(rows: Rows) -> list[Finding]:
    """Return the goals with `reuse_memory()`."""
    training = [row for row in rows if row["operation"] == "norm-relu"]
    return [
        *_ratios(
            "norm → ReLU, tensors over 48 MB: stock without ÷ ours with it",
            5.0,
            (row for row in training if row["tensor_bytes"] > HUGE_BYTES),
            "stock / ours" + REUSING,
        ),
        *_ratios("norm → ReLU: stock with ÷ ours with it", None, training, f"stock{REUSING} / ours{REUSING}"),
        *_floors("norm → ReLU: ours with it ÷ the floor", 1.3, training, "ours" + REUSING),
    ]


# What `lean` may hold for the backward, as a fraction of what stock does.
_HELD = {
    "VGG-11-BN": 0.62,
    "MobileNetV2": 0.55,
    "EfficientNet-B0": 0.55,
    "ResNet-50": 0.62,
    "pre-activation ResNet-50": 0.60,
    "DenseNet-121": 0.60,
}
_LEAN_TIME = 1.05


def lean_findings(rows: Rows) -> list[Finding]:
    """Return the goals of `lean`: bytes held, time of a step, gradients."""
    found: list[Finding] = []
    for row in rows:
        held, name = row["bytes_held"], row["network"]
        if name in _HELD:
            found += _finding(
                f"{name}: bytes held, lean ÷ stock",
                _HELD[name],
                [held["lean"] / held["stock"]],
                max,
                max,
                "≤",
            )
    for row in rows:
        ratio = row["ratios"]["lean / ours"]["median"]
        found += _finding(f"{row['network']}: time, lean ÷ not lean", _LEAN_TIME, [ratio], max, max, "≤")
    same = [float(row["gradients_identical"]) for row in rows]
    found += _finding("gradients identical bit for bit, of networks", 1.0, same, statistics.fmean, min, "≥")
    return found


def geometric_mean(values: Iterable[float]) -> float:
    """Return exp of the mean logarithm."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def _of(rows: Rows, operation: str, dtype: str) -> Rows:
    return [row for row in rows if (row["operation"], row["dtype"]) == (operation, dtype)]


def _contiguous(rows: Rows) -> Rows:
    return [row for row in rows if row["layout"] == "contiguous"]


def _ratios(
    what: str, goal: float | None, rows: Iterable[dict[str, Any]], name: str = "stock / ours"
) -> Iterable[Finding]:
    return _finding(what, goal, [row["ratios"][name]["median"] for row in rows], geometric_mean, min, "≥")


def _least(what: str, goal: float, rows: Iterable[dict[str, Any]]) -> Iterable[Finding]:
    return _finding(what, goal, [row["ratios"]["stock / ours"]["median"] for row in rows], min, min, "≥")


def _floors(what: str, goal: float, rows: Iterable[dict[str, Any]], name: str = "ours") -> Iterable[Finding]:
    found = [row["rivals"][name]["over_floor"] for row in rows]
    return _finding(what, goal, found, statistics.median, max, "≤")


def _finding(
    what: str,
    goal: float | None,
    values: list[float],
    middle: Callable[[list[float]], float],
    worst: Callable[[list[float]], float],
    sign: str,
) -> Iterable[Finding]:
    if not values:  # a quick look has not measured all
        return
    found = middle(values)
    reached = goal is None or (found >= goal if sign == "≥" else found <= goal)
    asked = "–" if goal is None else f"{sign} {goal:g}"
    yield Finding(what, asked, found, worst(values), len(values), reached)
