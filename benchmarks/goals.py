"""What was asked of the layers' speed, next to what was measured; a missed goal stays in the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .layer_cases import HUGE_BYTES, LARGE
from .reusing_process import REUSING
from .tables import table

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


def findings_table(findings: list[Finding]) -> str:
    """Return goals, what came of them, and the worst single row."""
    return table(
        ("", "goal", "found", "worst", "rows", ""),
        [
            (
                found.what,
                found.asked,
                f"{found.found:.2f}" if found.number else "",
                f"{found.worst:.2f}" if found.number else "",
                str(found.number),
                _verdict(found),
            )
            for found in findings
        ],
    )


def _verdict(found: Finding) -> str:
    if not found.number:
        return "not measured"
    return ("reached" if found.reached else "**missed**") if found.asked != "–" else ""


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


# Bytes of a tensor above which a layer on a GPU is compared with the floor.
_DEVICE_LARGE = 64_000_000


def device_layer_findings(rows: Rows) -> list[Finding]:
    """Return the goals of single layers on a GPU, those that nothing was measured of among them."""
    measured = [row for row in rows if "missing" not in row]
    main = [
        row
        for row in measured
        if (row["dtype"], row["layout"]) == ("bfloat16", "channels-last")
        and row["operation"].endswith("relu")
    ]
    large = [row for row in measured if row["tensor_bytes"] > _DEVICE_LARGE and "ours" in row["rivals"]]
    what = "norm → (add →) ReLU, bfloat16, channels-last and [N, C]: "
    found: list[Finding] = []
    for rival, goal in (("stock", 2.0), ("stock-native", 2.0), ("stock-in-place", None), ("compiled", 1.2)):
        name = f"{rival} / ours"
        of_rival = [row for row in main if name in row["ratios"]]
        found += _or_nothing(f"{what}{rival} ÷ ours", goal, "≥", _ratios, of_rival, name)
    what = "ours ÷ the floor, tensors over 64 MB"
    found += _or_nothing(what, 1.25, "≤", _floors, large, "ours")
    of_main = [row for row in large if row in main]
    return found + _or_nothing("the same, of the rows of the first goal", 1.25, "≤", _floors, of_main, "ours")


def device_step_findings(rows: Rows) -> list[Finding]:
    """Return the goals of ResNet-50's training step on a GPU, whether it was measured or not."""
    measured = [row for row in rows if row["network"] == "ResNet-50" and "missing" not in row]
    fused = [row for row in measured if "stock / fused" in row["ratios"]]
    found = _or_nothing("ResNet-50: images/s, fused ÷ stock", 1.15, "≥", _ratios, fused, "stock / fused")
    for what, key, goal in (("peak of a step", "peak", 0.65), ("held behind the forward", "held", None)):
        what = f"ResNet-50: bytes, {what}, lean ÷ stock"
        ratios = [
            row["variants"]["lean"]["bytes"][key] / row["variants"]["stock"]["bytes"][key]
            for row in measured
            if {"lean", "stock"} <= row["variants"].keys() and row["variants"]["lean"]["bytes"]
        ]
        found += list(_finding(what, goal, ratios, max, max, "≤")) or [_nothing(what, goal, "≤")]
    return found


def _or_nothing(
    what: str,
    goal: float | None,
    sign: str,
    find: Callable[..., Iterable[Finding]],
    rows: Rows,
    name: str,
) -> list[Finding]:
    return list(find(what, goal, rows, name)) or [_nothing(what, goal, sign)]


def _nothing(what: str, goal: float | None, sign: str) -> Finding:
    return Finding(what, _asked(goal, sign), math.nan, math.nan, 0, reached=False)


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
    yield Finding(what, _asked(goal, sign), found, worst(values), len(values), reached)


def _asked(goal: float | None, sign: str) -> str:
    return "–" if goal is None else f"{sign} {goal:g}"
