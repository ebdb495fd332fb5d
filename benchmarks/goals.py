"""Goals of speed and memory, compared with measured rows; a missed goal stays in the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .device.floor import ONE_PASS
from .layer_cases import EVALUATION, FORWARD_AND_BACKWARD, HUGE_BYTES, INFERENCE, LARGE, OPERATIONS
from .reusing_process import REUSING
from .tables import Row, Rows, table


@dataclass(frozen=True)
class Finding:
    """A goal and its outcome.

    Attributes:
        what: which rows, and which of their figures.
        asked: the goal, as text.
        found: geometric mean of ratios, or median of multiples of the floor.
        worst: the least ratio, or the largest multiple.
        number: of rows.
        reached: whether `found` reaches the goal, or each row where it is a goal of every row.
        worst_row: what the row of `worst` measures.
        below: rows that miss the goal, if they were counted.
    """

    what: str
    asked: str
    found: float
    worst: float
    number: int
    reached: bool
    worst_row: str = ""
    below: int | None = None


def findings_table(findings: list[Finding]) -> str:
    """Return goals, their outcomes, and the worst single row; and how many rows miss it, if counted."""
    counted = any(found.below is not None for found in findings)
    added = ("worst row", "rows", "below") if counted else ("rows",)
    return table(
        ("", "goal", "found", "worst", *added, ""),
        [
            (
                found.what,
                found.asked,
                f"{found.found:.2f}" if found.number else "",
                f"{found.worst:.2f}" if found.number else "",
                *((found.worst_row,) if counted else ()),
                str(found.number),
                *(("" if found.below is None else str(found.below),) if counted else ()),
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
    main = _where(large, operation="norm-relu", dtype="float32")
    evaluation = _measuring(rows, EVALUATION)
    of_bfloat16 = _where(large, operation="norm-relu", dtype="bfloat16", layout="contiguous")
    adding = _where(large, operation="norm-add-relu", dtype="float32", layout="contiguous")
    large_evaluation = [row for row in evaluation if row["values"] > LARGE]
    tiny = _where(rows, operation="norm-relu", dtype="float32", shape=[32, 64])
    what = "over 2¹⁸ values: stock ÷ ours"
    return [
        *_ratios(f"norm → ReLU, float32, contiguous, {what}", 3.5, _where(main, layout="contiguous")),
        *_ratios("the same, channels-last and [N, C]", 2.2, _where(main, layout="channels-last")),
        *_least("norm → ReLU, float32, any over 2¹⁸ values: the least stock ÷ ours", 1.4, main),
        *_ratios(f"norm → ReLU, bfloat16, contiguous, {what}", 3.0, of_bfloat16),
        *_ratios(f"norm → add → ReLU, float32, contiguous, {what}", 3.0, adding),
        *_least("evaluation, forward: the least stock ÷ ours", 1.0, evaluation),
        *_floors("evaluation, forward, over 2¹⁸ values: ours ÷ a copy", 1.2, large_evaluation),
        *_ratios("norm → ReLU, float32, (32, 64): stock ÷ ours", 0.9, tiny),
    ]


# A row meets its goal from this fraction of it on, as medians are not exact. Where stock's own time is near
# the floor, nothing can be much faster: there ours has to be near it, too.
_TOLERANCE = 0.97
_STOCK_NEAR_FLOOR, _OURS_NEAR_FLOOR = 1.15, 1.10


def layer_row_findings(rows: Rows) -> list[Finding]:
    """Return the goals of every row of single layers, and of their geometric means."""
    large = [row for row in rows if row["values"] > LARGE]
    main = _where(large, operation="norm-relu", dtype="float32")
    channels_last = _where(main, layout="channels-last")
    bfloat16 = _where(large, operation="norm-relu", dtype="bfloat16", layout="contiguous")
    tiny = _where(rows, operation="norm-relu", dtype="float32", shape=[32, 64])
    what = "norm → ReLU, float32, over 2¹⁸ values, "
    return [
        _every("training: stock ÷ ours", 1.0, _measuring(rows, FORWARD_AND_BACKWARD)),
        _every("evaluation: stock ÷ ours", 1.0, _measuring(rows, EVALUATION)),
        _every("inference mode: stock ÷ ours", 1.0, _measuring(rows, INFERENCE)),
        _every("norm → ReLU, float32, (32, 64), training: stock ÷ ours", 1.1, tiny),
        _on_average(f"{what}contiguous: stock ÷ ours", 3.2, _where(main, layout="contiguous")),
        _on_average(f"{what}channels-last and [N, C]: stock ÷ ours", 1.8, channels_last),
        _on_average("norm → ReLU, bfloat16, over 2¹⁸ values, contiguous: stock ÷ ours", 2.5, bfloat16),
    ]


# Network and layout of a whole training step -> how many times faster it must be.
_STEPS = {
    ("ResNet-18", "contiguous"): 1.05,
    ("ResNet-50", "contiguous"): 1.05,
    ("MobileNetV2", "contiguous"): 1.30,
    ("DenseNet-121", "contiguous"): 1.12,
    ("ResNet-50", "channels-last"): 1.0,
    ("MobileNetV2", "channels-last"): 1.15,
}


def step_findings(rows: Rows) -> list[Finding]:
    """Return the goals of whole training steps of large networks."""
    return [
        _every(f"{network}, {layout}: stock ÷ ours", goal, _where(rows, network=network, layout=layout))
        for (network, layout), goal in _STEPS.items()
    ]


# Small networks that must not be slower than stock's, and the forms of ours that they have.
_SMALL_STEPS = {"MLP": ("drop-in",), "deep": ("drop-in", "fused"), "critic": ("drop-in", "fused")}


def small_step_findings(rows: Rows) -> list[Finding]:
    """Return the goals of whole training steps of small networks, on one thread."""
    return [
        _every(
            f"{network}, one thread: stock ÷ {form}",
            1.0,
            _where(rows, network=network, threads=1),
            f"stock / {form}",
        )
        for network, forms in _SMALL_STEPS.items()
        for form in forms
    ]


_FIRST_CALL = 0.8  # seconds


def first_call_findings(rows: Rows) -> list[Finding]:
    """Return the goal of the first call of a process."""
    seconds = [row["seconds"]["ours"]["total"] for row in rows]
    what = "first call, with the import of the layer, s"
    return [
        replace(found, reached=found.found <= _FIRST_CALL / _TOLERANCE)
        for found in _finding(what, _FIRST_CALL, seconds, statistics.median, max, "≤")
    ]


def reuse_memory_findings(rows: Rows) -> list[Finding]:
    """Return the goals with `reuse_memory()`."""
    training = _where(rows, operation="norm-relu")
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
# Rival -> how many times faster ours must be where each channel is read twice (docs/gpu.md: at most 13 / 8
# where torch takes cuDNN); None = shown without a goal.
_DEVICE_RATIOS = {"stock": 1.4, "stock-native": 2.0, "stock-in-place": None, "compiled": 1.1}
_DEVICE_ON_CHIP = 2.0  # times faster than stock where a channel's values stay on chip


def device_layer_findings(rows: Rows) -> list[Finding]:
    """Return the goals of single layers on a GPU, those that nothing was measured of among them."""
    measured = [row for row in rows if "missing" not in row]
    fused = [row for row in measured if row["dtype"] == "bfloat16" and row["operation"].endswith("relu")]
    on_chip = [row for row in fused if row["regime"] == ONE_PASS]
    main = [row for row in fused if row["layout"] == "channels-last" and row["regime"] != ONE_PASS]
    large = [row for row in measured if row["tensor_bytes"] > _DEVICE_LARGE and "ours" in row["rivals"]]
    what = "norm → (add →) ReLU, bfloat16, "
    found: list[Finding] = []
    for rival, goal in _DEVICE_RATIOS.items():
        name = f"{rival} / ours"
        of_rival = [row for row in main if name in row["ratios"]]
        of_what = f"{what}channels-last and [N, C], read twice: {rival} ÷ ours"
        found += _or_nothing(of_what, goal, "≥", _ratios, of_rival, name)
    name = "stock / ours"
    of_chip = [row for row in on_chip if name in row["ratios"]]
    of_what = f"{what}any layout, on chip: stock ÷ ours"
    found += _or_nothing(of_what, _DEVICE_ON_CHIP, "≥", _ratios, of_chip, name)
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


def _where(rows: Rows, **fields: object) -> Rows:
    """Return the rows with these values of these fields."""
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def _measuring(rows: Rows, operations: Iterable[str]) -> Rows:
    return [row for row in rows if row["operation"] in operations]


def _ratios(
    what: str, goal: float | None, rows: Iterable[Row], name: str = "stock / ours"
) -> Iterable[Finding]:
    return _finding(what, goal, [row["ratios"][name]["median"] for row in rows], geometric_mean, min, "≥")


def _least(what: str, goal: float, rows: Iterable[Row]) -> Iterable[Finding]:
    return _finding(what, goal, [row["ratios"]["stock / ours"]["median"] for row in rows], min, min, "≥")


def _every(what: str, goal: float, rows: Rows, name: str = "stock / ours") -> Finding:
    """Return a goal that each row must meet; found is the geometric mean."""
    found = _on_average(what, goal, rows, name)
    asked = _asked(goal, "≥")
    return replace(found, asked=asked if found.number == 1 else f"every {asked}", reached=found.below == 0)


def _on_average(what: str, goal: float, rows: Rows, name: str = "stock / ours") -> Finding:
    """Return a goal of the rows' geometric mean, with the number of rows that miss it."""
    if not rows:
        return _nothing(what, goal, "≥")
    worst = min(rows, key=lambda row: _median(row, name))
    found = geometric_mean(_median(row, name) for row in rows)
    below = sum(not _is_met(row, goal, name) for row in rows)
    return Finding(
        what,
        f"mean {_asked(goal, '≥')}",
        found,
        _median(worst, name),
        len(rows),
        found >= goal,
        _name_of(worst),
        below,
    )


def _median(row: Row, name: str) -> float:
    median: float = row["ratios"][name]["median"]
    return median


def _is_met(row: Row, goal: float, name: str) -> bool:
    if _median(row, name) >= _TOLERANCE * goal:
        return True
    rivals = row.get("rivals")  # whole steps have no floor
    return (
        rivals is not None
        and rivals["stock"]["over_floor"] <= _STOCK_NEAR_FLOOR
        and rivals["ours"]["over_floor"] <= _OURS_NEAR_FLOOR
    )


def _name_of(row: Row) -> str:
    if "operation" not in row:
        return str(row["network"])
    return f"{OPERATIONS[row['operation']]}, {row['dtype']}, {tuple(row['shape'])}, {row['layout']}"


def _floors(what: str, goal: float, rows: Iterable[Row], name: str = "ours") -> Iterable[Finding]:
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
