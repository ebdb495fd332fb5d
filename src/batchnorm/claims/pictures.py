"""The pictures of a claim, drawn from what its seeds found, as the study draws its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from batchnorm.studies.plots import Picture
from batchnorm.studies.plots.canvas import (
    GRID,
    INK,
    SOFT,
    SUBJECT_COLOR,
    Dash,
    color_named,
    draw,
    legend,
    of_curves,
    shown,
    ticks,
)
from batchnorm.studies.plots.multiples import log_axis, percent_axis
from batchnorm.studies.plots.rows import ROW
from batchnorm.studies.plots.values import Curve, Style, Values
from batchnorm.studies.verdicts import formatting as q

from .claim import Bars, Claim, Drawing, Findings, Grid, Lines
from .rules import Judged
from .summary import shown as shown_value

_DASHES: tuple[tuple[float, ...], ...] = ((), (4, 2), (6, 2, 1, 2), (1, 2))


def illustrate(claim: Claim, findings: Sequence[Findings]) -> tuple[Picture, ...]:
    """Draws the pictures of a claim from the findings of its seeds."""
    return tuple(
        _draw(f"{claim.name}-{number}", drawing, findings)
        for number, drawing in enumerate(claim.drawings, start=1)
    )


def _draw(key: str, drawing: Drawing, findings: Sequence[Findings]) -> Picture:
    if isinstance(drawing, Lines):
        return _lines(key, drawing, findings)
    if isinstance(drawing, Bars):
        return _bars(key, drawing, findings)
    return _grid(key, drawing, findings)


def _styles(names: Sequence[str]) -> dict[str, Style]:
    """Returns a colour and a dash for each line: batch normalization and its absence have their own."""
    found: dict[str, Style] = {}
    counts: dict[str, int] = {}
    for name in names:
        plain = name.startswith(("none", "not adapted", "without"))
        color = "subject" if name.startswith("batchnorm") else "baseline" if plain else "other1"
        counts[color] = counts.get(color, -1) + 1
        found[name] = Style(color, dash=_DASHES[counts[color] % len(_DASHES)])
    return found


def _lines(key: str, drawing: Lines, findings: Sequence[Findings]) -> Picture:
    bands = _bands(drawing, findings)
    styles = _styles(list(bands))
    show: Callable[[float], str] = q.percent if drawing.percent else (lambda value: q.significant(value, 3))
    ends = "; ".join(
        f"{name} {show(float(mean[-1]))} at {q.significant(float(x[-1]), 3)}"
        for name, (x, mean, _, _) in bands.items()
    )

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        handles = []
        for name, (x, mean, low, high) in bands.items():
            color = color_named(styles[name].color)
            dash: Dash = (0, styles[name].dash) if styles[name].dash else "-"
            axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
            axes.plot(x, mean, color=color, linestyle=dash)
            handles.append(Line2D([], [], color=color, linestyle=dash, label=shown(name, 34)))
        for name, (places, values) in drawing.references.items():
            axes.plot(places, values, color=SOFT, linestyle=":", linewidth=1.0)
            handles.append(Line2D([], [], color=SOFT, linestyle=":", label=name))
        _axes_of_lines(axes, drawing)
        legend(figure, handles, 2 if len(handles) > 1 else 1, 2.2)

    lines = len(bands) + len(drawing.references)
    alt = f"{drawing.title}. Mean over seeds, with their range; at the end: {ends}."
    values = _values_of_lines(drawing, findings, styles)
    return draw(key, drawing.title, alt, 2.2 + 0.17 * math.ceil(lines / 2), paint, values=values)


def _values_of_lines(drawing: Lines, findings: Sequence[Findings], styles: Mapping[str, Style]) -> Values:
    curves = [
        Curve((name, seed), curve.y, curve.x, style=styles[name])
        for name in styles
        for seed, one in enumerate(findings)
        if (curve := one.curves[drawing.key].get(name)) is not None
    ]
    for name, (places, values) in drawing.references.items():
        style = Style("soft", dash=(1, 2))
        curves += [Curve((name, seed), values, places, style=style) for seed in range(len(findings))]
    return Values(
        ("line", "seed"),
        drawing.title,
        curves,
        drawing.x,
        series="line",
        band="range",
        percent=drawing.percent,
        log_x=drawing.log_x,
        log_y=drawing.log_y,
        geometric=drawing.log_y,
    )


def _axes_of_lines(axes: Axes, drawing: Lines) -> None:
    axes.set_xlabel(drawing.x, loc="right")
    if drawing.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        ticks(axes.xaxis, 4, "{x:,.4g}")
    if drawing.log_y:
        log_axis(axes)
    elif drawing.percent:
        percent_axis(axes)
    else:
        ticks(axes.yaxis, 4, "{x:g}")


_Band = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # x, mean, lowest, highest


def _bands(drawing: Lines, findings: Sequence[Findings]) -> dict[str, _Band]:
    """Returns the mean and range over seeds of each line, at the places of the first seed."""
    found: dict[str, _Band] = {}
    for name, first in findings[0].curves[drawing.key].items():
        curves = [one.curves[drawing.key][name] for one in findings]
        values = np.array([list(curve.y) for curve in curves if len(curve.y) == len(first.y)], float)
        if values.size:
            logs = drawing.log_y and values.min() > 0
            mean = np.exp(np.log(values).mean(0)) if logs else values.mean(0)
            found[name] = np.array(first.x, float), mean, values.min(0), values.max(0)
    return found


def _bars(key: str, drawing: Bars, findings: Sequence[Findings]) -> Picture:
    show: Callable[[float], str] = (
        q.percent if drawing.unit == "percent" else (lambda value: q.significant(value, 3))
    )
    rows = {name: [one.numbers[number] for one in findings] for name, number in drawing.rows.items()}
    notes = {name: show(float(np.mean(values))) for name, values in rows.items()}

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, (name, values) in enumerate(rows.items()):
            gid = of_curves(range(row * len(findings), (row + 1) * len(findings)))
            look: dict[str, Any] = {"color": color_named(_styles([name])[name].color), "gid": gid}
            axes.plot(values, [row] * len(values), "o", markersize=5, alpha=0.45, **look)
            axes.plot([float(np.mean(values))], [row], marker="|", markersize=11, markeredgewidth=2, **look)
            axes.annotate(
                notes[name],
                (1, row),
                (8, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
            )
        _rows_of(axes, list(rows))
        if drawing.unit == "percent":
            ticks(axes.xaxis, 3, lambda value: f"{100 * value:g} %", steps=[1, 2, 2.5, 5, 10])
        else:
            ticks(axes.xaxis, 4, "{x:,.4g}")

    alt = f"{drawing.title}. {'; '.join(f'{name} {note}' for name, note in notes.items())}."
    all_values = Values(
        ("row", "seed"),
        drawing.title,
        [
            Curve((name, seed), [value], style=_styles([name])[name])
            for name, found in rows.items()
            for seed, value in enumerate(found)
        ],
        series="row",
        percent=drawing.unit == "percent",
    )
    return draw(key, drawing.title, alt, 0.5 + ROW * max(len(rows), 2), paint, values=all_values)


def _rows_of(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [shown(name, 26) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.yaxis.grid(False)
    axes.spines["left"].set_visible(False)
    for label in axes.get_yticklabels():
        label.set_color(INK)


def _grid(key: str, drawing: Grid, findings: Sequence[Findings]) -> Picture:
    values = np.array([one.grids[drawing.key] for one in findings], float)
    means = np.where(np.isnan(values).any(0), np.nan, np.nan_to_num(values).mean(0))
    rows, columns = means.shape
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    is_small = rows * columns <= 30

    def show(value: float) -> str:
        return q.percent(value) if drawing.unit == "percent" else q.significant(value, 2)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row in range(rows):
            for column in range(columns):
                value = float(means[row, column])
                if math.isfinite(value):
                    strength = 0.06 + 0.8 * (value - low) / max(high - low, 1e-12)
                    box = Rectangle(
                        (column - 0.5, row - 0.5), 1, 1, facecolor=SUBJECT_COLOR, alpha=strength, linewidth=0
                    )
                    axes.add_patch(box)
                    if is_small:
                        axes.annotate(show(value), (column, row), ha="center", va="center", color=INK)
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.grid(False)
        stride = math.ceil(columns / 6)
        labels = drawing.columns or tuple(f"{drawing.step * i:g}" for i in range(columns))
        axes.set_xticks(range(0, columns, stride), labels[::stride])
        names = drawing.rows or tuple(str(i + 1) for i in range(rows))
        axes.set_yticks(range(0, rows, math.ceil(rows / 12)), names[:: math.ceil(rows / 12)])
        axes.set_xlabel(f"{drawing.x}; rows: {drawing.y}", loc="right")

    alt = (
        f"{drawing.title}: from {show(low)} to {show(high)}, by {drawing.x} and {drawing.y}. Mean over seeds."
    )
    title = f"{drawing.title}: {show(low)} (pale) to {show(high)}"
    return draw(key, title, alt, 0.7 + 0.21 * rows, paint, values=_values_of_grid(drawing, findings))


def _values_of_grid(drawing: Grid, findings: Sequence[Findings]) -> Values:
    curves = []
    for seed, one in enumerate(findings):
        for row, values in enumerate(one.grids[drawing.key]):
            name = drawing.rows[row] if drawing.rows else str(row + 1)
            curves += [
                Curve(
                    (name, drawing.columns[i] if drawing.columns else f"{drawing.step * i:g}", seed), [value]
                )
                for i, value in enumerate(values)
            ]
    percent = drawing.unit == "percent"
    return Values((drawing.y, drawing.x, "seed"), drawing.title, curves, series=drawing.y, percent=percent)


def intervals(key: str, parts: Sequence[Judged]) -> Picture:
    """Draws each part's interval between no effect and the published band: a row each, scaled to the band.

    The scale of a row runs so that no effect, or the middle of a band around it, is at 0 and the near end of
    the band
    at 1; logarithms of ratios.
    """
    places = [_scaled(judged) for judged in parts]
    told = "; ".join(
        f"{judged.part.measure}: {shown_value(judged.part, judged.interval[0])} to "
        f"{shown_value(judged.part, judged.interval[1])}"
        for judged in parts
    )

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, (judged, (low, mean, high, first, last)) in enumerate(zip(parts, places, strict=True)):
            band = Rectangle(
                (max(first, -3), row - 0.32), min(last, 6) - max(first, -3), 0.64, facecolor=GRID, linewidth=0
            )
            axes.add_patch(band)
            if judged.part.none is not None:
                axes.plot([0, 0], [row - 0.32, row + 0.32], color=SOFT, linewidth=0.9)
            if math.isfinite(mean):
                axes.plot([max(low, -3), min(high, 6)], [row, row], color=SUBJECT_COLOR, linewidth=2.2)
                inside = min(max(mean, -3), 6)
                axes.plot([inside], [row], color=SUBJECT_COLOR, marker="o", markersize=5)
        _rows_of(axes, [f"part {row + 1}" for row in range(len(parts))])
        axes.set_xlim(-3, 6)
        axes.set_xticks([0, 1], ["no effect", "published"])
        left, right = axes.get_xticklabels()
        left.set_horizontalalignment("right")
        right.set_horizontalalignment("left")

    title = "Interval of each part; grey: the published effect"
    return draw(key, title, f"{title}. {told}.", 0.5 + ROW * max(len(parts), 2), paint)


def _scaled(judged: Judged) -> tuple[float, float, float, float, float]:
    """Returns low, mean and high of the interval, and both ends of the band, on the scale of `intervals`."""
    part = judged.part
    change: Callable[[float], float] = (
        (lambda value: math.log(max(value, 1e-300))) if part.unit == "ratio" else (lambda value: value)
    )
    first, last = (end if math.isinf(end) else change(end) for end in part.band)
    finite = [end for end in (first, last) if math.isfinite(end)]
    zero = (
        change(part.none)
        if part.none is not None
        else (sum(finite) / 2 if len(finite) == 2 else finite[0] - 1)
    )
    near = min(finite, key=lambda end: abs(end - zero) or math.inf)
    unit = abs(near - zero) or 1.0
    sign = -1.0 if part.none is not None and last <= zero else 1.0
    ends = [sign * (end if math.isinf(end) else (end - zero) / unit) for end in (first, last)]
    values = [
        sign * (change(value) - zero) / unit if math.isfinite(value) else math.nan
        for value in (judged.interval[0], judged.mean, judged.interval[1])
    ]
    return values[0], values[1], values[2], min(ends), max(ends)


__all__ = ["illustrate", "intervals"]
