"""The picture of a calibration: how far the running statistics of each layer were off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from batchnorm.statistics.calibration import CalibrationReport, LayerChange

from . import canvas
from .canvas import SOFT, SUBJECT_COLOR, Picture, shown
from .rows import ROW

_LEAST = 1e-3  # standard deviations: nearer than that is drawn there
_WIDTH = 6.3  # inches


def draw(report: CalibrationReport, path: str | Path) -> Picture:
    """Draws a row per layer into an SVG file: means and deviations of its channels against the old ones.

    Raises:
        OptionError: the name of the file does not end in .svg.
    """
    drawn = picture("calibration", report)
    canvas.save(drawn, Path(path))
    return drawn


def picture(key: str, report: CalibrationReport) -> Picture:
    """Returns the picture for a page; see `draw`.

    Args:
        key: unique within the page.
        report: with a layer at least.
    """
    layers = report.layers
    shifts = [[max(shift, _LEAST) for shift in _shifts(layer)] for layer in layers]
    ratios = [_ratios(layer) for layer in layers]

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _ranges(left, shifts, layers)
        _ranges(right, ratios, layers)
        right.axvline(1.0, color=SOFT, linewidth=0.8)
        names = [shown(layer.name) + ("" if layer.exact else " *") for layer in layers]
        left.set_yticks(range(len(layers)), names)
        left.set_ylim(len(layers) - 0.4, -0.6)
        left.set_xlim(left=_LEAST)
        left.set_xlabel("mean moved by, standard deviations", loc="right")
        right.set_xlabel("standard deviation became, times", loc="right")

    return canvas.draw(
        key,
        "How far the running statistics were off",
        _told(report),
        0.7 + ROW * len(layers),
        paint,
        width=_WIDTH,
    )


def _ranges(axes: Axes, values: Sequence[Sequence[float]], layers: Sequence[LayerChange]) -> None:
    """Draws a row per layer: a line over its channels, thick over their middle half, a dot at the median."""
    axes.set_xscale("log")
    for row, (channels, layer) in enumerate(zip(values, layers, strict=True)):
        low, middle, high = _quartiles(channels)
        axes.plot([min(channels), max(channels)], [row, row], color=SUBJECT_COLOR, linewidth=0.9)
        axes.plot([low, high], [row, row], color=SUBJECT_COLOR, linewidth=3.4, alpha=0.55)
        style = "full" if layer.exact else "none"
        axes.plot([middle], [row], color=SUBJECT_COLOR, marker="o", markersize=4.5, fillstyle=style)
    axes.yaxis.grid(False)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if _decades(values) > 1.5 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _decades(values: Sequence[Sequence[float]]) -> float:
    return math.log10(max(map(max, values)) / min(map(min, values)))


def _quartiles(channels: Sequence[float]) -> tuple[float, float, float]:
    if len(channels) == 1:
        return (channels[0],) * 3
    low, middle, high = statistics.quantiles(channels, method="inclusive")
    return low, middle, high


def _shifts(layer: LayerChange) -> Sequence[float]:
    return layer.mean_shifts or (layer.mean_shift,)


def _ratios(layer: LayerChange) -> Sequence[float]:
    return layer.std_ratios or (layer.std_ratio,)


def _told(report: CalibrationReport) -> str:
    furthest = max(report.layers, key=lambda layer: layer.mean_shift)
    told = [f"{layer.name} by {statistics.median(_shifts(layer)):.2g}" for layer in report.layers[:8]]
    more = ", and so on" if len(report.layers) > 8 else ""
    return (
        f"How far the running statistics of {len(report.layers)} layers were off, a row per layer, on log "
        "scales. Median over the channels of how far the mean moved, in standard deviations: "
        f"{', '.join(told)}{more}. Most: a channel of {furthest.name}, by {furthest.mean_shift:.2g}."
    )
