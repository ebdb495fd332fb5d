"""Pictures with a row per arm: a dot per seed, a mark at the mean, the number at the end of the row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchnorm.studies.verdicts import formatting as q
from batchnorm.studies.verdicts.results import SUBJECT, Network, Sample, is_normalized, sample
from batchnorm.studies.verdicts.serving import accuracies_at_test_time
from batchnorm.studies.verdicts.significance import MINIMAL_ACCURACY, Comparison
from batchnorm.studies.verdicts.training import accuracy_against, reached

from .canvas import GRID, INK, SOFT, Picture, color_of, draw, of_curves, shown, ticks
from .multiples import style_of
from .values import Curve, Label, Values

ROW = 0.235


@dataclass(frozen=True)
class Row:
    """One line of a picture of rows.

    Attributes:
        name: what it is of.
        sample: the values.
        note: the number at its end.
        labels: of each value; the row's name and the seed.
    """

    name: str
    sample: Sample
    note: str
    labels: tuple[tuple[Label, ...], ...] = ()

    def curves(self) -> list[Curve]:
        """Returns the finite values, each with its labels."""
        pairs = zip(self.labels, self.sample.values, strict=True) if self.labels else ()
        return [
            Curve(labels, [value], style=style_of(str(labels[0])))
            for labels, value in pairs
            if math.isfinite(value)
        ]


def steps_to_target(key: str, network: Network) -> Picture | None:
    """Steps to the target accuracy, for each arm at its best rate."""
    rows = []
    for arm in network.arms:
        runs = network.at_best(arm)
        steps, got_there = sample(runs, "steps_to_target"), reached(runs)
        note = q.spread(steps, q.count) if got_there else "not reached"
        some = f" ({got_there}/{len(runs)})" if 0 < got_there < len(runs) else ""
        rows.append(Row(arm, steps, note + some, tuple((arm, seed) for seed in runs)))
    if not any(row.sample.finite for row in rows):
        return None
    target = q.percent(network.target)
    alt = f"Steps to {target} held-out accuracy of {network.name}, each arm at its best rate. {_told(rows)}."

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        _dots(axes, rows, 0)
        for i, row in enumerate(rows):
            if len(row.sample.finite) < len(row.sample.values):
                shade, x = color_of(row.name), [network.length]
                axes.plot(x, [i], ">", color=shade, markersize=5, fillstyle="none", clip_on=False)
        axes.set_xlim(0, network.length)
        axes.set_xlabel("training steps", loc="right")
        axes.xaxis.set_major_formatter("{x:,.0f}")

    values = Values(("arm", "seed"), "training steps", _curves(rows))
    return draw(key, f"Steps to {target} held-out accuracy", alt, _height(len(rows)), paint, values=values)


def statistics_at_test_time(key: str, network: Network) -> Picture | None:
    """Held-out accuracy under batch, running and calibrated statistics, at the best rate."""
    panels = {}
    for arm in filter(is_normalized, network.arms):
        runs = network.at_best(arm)
        seeds = [seed for seed, run in runs.items() if not run.diverged]
        rows = [
            Row(
                kind,
                Sample(values),
                q.spread(Sample(values), q.percent),
                tuple((arm, kind, seed) for seed in seeds),
            )
            for kind, values in accuracies_at_test_time(runs).items()
        ]
        if any(row.sample.finite for row in rows):
            panels[arm] = rows
    if not panels:
        return None
    told = "; ".join(f"{arm}: {_told(rows)}" for arm, rows in panels.items())
    alt = f"Held-out accuracy of {network.name} under three kinds of test-time statistics. {told}."

    def paint(figure: Figure) -> None:
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
        first = 0
        for axes, (arm, rows) in zip(grid[:, 0], panels.items(), strict=True):
            _dots(axes, rows, first, color=color_of(arm))
            first += len(_curves(rows))
            axes.set_title(shown(arm), weight="bold")
            ticks(axes.xaxis, 4, lambda value: f"{100 * value:.4g} %", steps=[1, 2, 2.5, 5, 10])
        _at_least_wide(grid[0, 0], 2 * MINIMAL_ACCURACY)  # for all: they share the axis, and all is drawn
        grid[-1, 0].set_xlabel("held-out accuracy", loc="right")

    height = 0.4 + len(panels) * (3 * ROW + 0.3)
    values = Values(
        ("arm", "statistics", "seed"),
        "held-out accuracy",
        [curve for rows in panels.values() for curve in _curves(rows)],
        percent=True,
    )
    return draw(key, "Held-out accuracy by test-time statistics", alt, height, paint, values=values)


def differences(key: str, network: Network) -> Picture | None:
    """Paired differences in held-out accuracy between batch normalization and each other arm."""
    if SUBJECT not in network.arms:
        return None
    found = {arm: accuracy_against(network, arm) for arm in network.arms if arm != SUBJECT}
    found = {arm: comparison for arm, comparison in found.items() if comparison.n}
    if not found:
        return None
    told = "; ".join(f"{arm} {q.points(c.mean)}, {c.basis(q.points)}" for arm, c in found.items())
    alt = f"Held-out accuracy of {network.name} with batchnorm minus that of each other arm. {told}."
    left, right = _reach(list(found.values()))

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.axvspan(-100 * MINIMAL_ACCURACY, 100 * MINIMAL_ACCURACY, color=GRID, linewidth=0, alpha=0.7)
        axes.axvline(0, color=SOFT, linewidth=0.8)
        for i, (arm, comparison) in enumerate(found.items()):
            mean, half = 100 * comparison.mean, 100 * comparison.half_width
            look: dict[str, Any] = {"color": color_of(arm), "gid": of_curves([i])}
            if math.isfinite(half):
                axes.plot([mean - half, mean + half], [i, i], linewidth=2.2, alpha=0.55, **look)
            axes.plot([mean], [i], marker="o", markersize=5, **look)
            _note(axes, i, q.points(comparison.mean).split(q.SPACE)[0])
        _rows_of(axes, list(found))
        axes.set_xlim(100 * left, 100 * right)
        axes.set_xlabel("points of accuracy: worse ← 0 → better", loc="right")

    values = Values(
        ("arm", "quantity"),
        "points of accuracy",
        [
            Curve((arm, "batchnorm minus this arm, mean over seeds"), [100 * c.mean], style=style_of(arm))
            for arm, c in found.items()
        ],
    )
    title = "Held-out accuracy: batchnorm minus the other arm"
    return draw(key, title, alt, _height(len(found)), paint, values=values)


def _reach(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """Returns the ends of an axis of differences: those of the intervals, within a limit."""
    most = 2.5 * max(3 * MINIMAL_ACCURACY, *(abs(comparison.mean) for comparison in comparisons))
    least = 2 * MINIMAL_ACCURACY
    halves = [
        0.0 if math.isnan(comparison.half_width) else comparison.half_width for comparison in comparisons
    ]
    pairs = list(zip(comparisons, halves, strict=True))
    left = max(min(-least, *(comparison.mean - half for comparison, half in pairs)), -most)
    right = min(max(least, *(comparison.mean + half for comparison, half in pairs)), most)
    margin = 0.05 * (right - left)
    return left - margin, right + margin


def cost(key: str, network: Network) -> Picture | None:
    """Seconds and bytes of a training step, for each arm, and with the framework's own layer."""
    kinds = (
        ("time per step, ms", "seconds_per_step", 1e-3, q.duration),
        ("memory kept, MB", "bytes_kept_for_backward", 1e6, q.megabytes),
    )
    columns = []
    for name, metric, unit, show in kinds:
        samples = {arm: getattr(network.summary(arm), metric) for arm in network.timed}
        rows = [Row(arm, measured, show(measured.median)) for arm, measured in samples.items()]
        if any(row.sample.median > 0 for row in rows):
            columns.append((name, unit, rows))
    if not columns:
        return None
    told = ". ".join(f"{name.partition(',')[0].capitalize()}: {_told(rows)}" for name, _, rows in columns)
    alt = f"Cost of a training step of {network.name}. {told}."

    def paint(figure: Figure) -> None:
        grid = figure.subplots(1, len(columns), sharey=True, squeeze=False)
        for column, (axes, (name, unit, rows)) in enumerate(zip(grid[0], columns, strict=True)):
            for i, row in enumerate(rows):
                middle = row.sample.median / unit
                text, end = q.significant(middle, 3), middle if math.isfinite(middle) else 0
                bar = axes.barh(i, end, height=0.5, color=color_of(row.name), alpha=0.75)
                bar[0].set_gid(of_curves([column * len(rows) + i]))
                axes.annotate(text, (end, i), (3, 0), textcoords="offset points", va="center", color=INK)
            axes.set_xlim(0, 1.45 * max(row.sample.median for row in rows if row.sample.finite) / unit)
            ticks(axes.xaxis, 2, "{x:g}")
            axes.set_title(name)
            _rows_of(axes, [row.name for row in rows])

    values = Values(
        ("arm", "quantity"),
        "median",
        [
            Curve((row.name, name), [row.sample.median / unit], style=style_of(row.name))
            for name, unit, rows in columns
            for row in rows
        ],
    )
    height = _height(len(network.timed)) + 0.1
    return draw(key, "Cost of a training step", alt, height, paint, values=values)


def _dots(axes: Axes, rows: Sequence[Row], first: int, color: str | None = None) -> None:
    """Draws the values of rows, whose curves are counted from `first`, and their means."""
    for i, row in enumerate(rows):
        values = row.sample.finite
        shade = color or color_of(row.name)
        gid = of_curves(range(first, first + len(values)))
        first += len(values)
        axes.plot(values, [i] * len(values), "o", color=shade, markersize=5, alpha=0.45, gid=gid)
        if values:
            mark: dict[str, Any] = {"marker": "|", "markersize": 11, "markeredgewidth": 2, "gid": gid}
            axes.plot([row.sample.mean], [i], color=shade, **mark)
        _note(axes, i, row.note)
    _rows_of(axes, [row.name for row in rows])


def _curves(rows: Sequence[Row]) -> list[Curve]:
    return [curve for row in rows for curve in row.curves()]


def _note(axes: Axes, row: int, text: str) -> None:
    axes.annotate(
        text, (1, row), (8, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center"
    )


def _rows_of(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [shown(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.yaxis.grid(False)
    axes.spines["left"].set_visible(False)
    for label in axes.get_yticklabels():
        label.set_color(INK)


def _at_least_wide(axes: Axes, width: float) -> None:
    low, high = axes.get_xlim()
    missing = max(0.0, width - (high - low)) / 2
    axes.set_xlim(low - missing, high + missing)


def _height(rows: int) -> float:
    return 0.5 + ROW * max(rows, 2)


def _told(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row.name} {row.note}" for row in rows)
