"""The picture of a diagnosis: how far each layer's statistics are off, and how noisy its batches are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from batchnorm.doctor import thresholds
from batchnorm.doctor.findings import Diagnosis

from .canvas import BASELINE_COLOR, SOFT, SUBJECT_COLOR, Picture, draw, shown
from .rows import ROW

_LEAST = 1e-3  # nearer than that is drawn there
_MOST_LAYERS = 60
_WIDTH = 6.3  # inches


def picture(key: str, diagnosis: Diagnosis) -> Picture:
    """Returns the picture for a page: a row per layer, a dot per number, a line at its threshold.

    Args:
        key: unique within the page.
        diagnosis: with layers.
    """
    layers = diagnosis.layers[:_MOST_LAYERS]
    columns = (
        ("mean off, standard deviations", [of.mean_off for of in layers], thresholds.OFF_MEAN),
        ("standard deviation off, times", [of.std_ratio - 1 for of in layers], thresholds.OFF_STD - 1),
        (
            "noise of batch means",
            [math.nan if of.noise is None else of.noise for of in layers],
            thresholds.NOISE,
        ),
    )

    def paint(figure: Figure) -> None:
        axes = figure.subplots(1, 3, sharey=True)
        for place, (label, values, limit) in zip(axes, columns, strict=True):
            _dots(place, values, limit)
            place.set_xlabel(label, loc="right")
        axes[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 + value:g}"))
        axes[0].set_yticks(range(len(layers)), [shown(of.layer or "(the model)") for of in layers])
        axes[0].set_ylim(len(layers) - 0.4, -0.6)

    told = [f"{of.layer}: {of.mean_off:.2g} standard deviations off" for of in layers[:8]]
    alt = f"A row per layer, on log scales, with a line at each threshold. {'; '.join(told)}."
    height = 0.8 + ROW * len(layers)
    return draw(key, "Running statistics and batches, layer by layer", alt, height, paint, width=_WIDTH)


def _dots(axes: Axes, values: Sequence[float], limit: float) -> None:
    axes.set_xscale("log")
    axes.axvline(limit, color=SOFT, linewidth=0.8)
    for row, value in enumerate(values):
        if math.isfinite(value):
            color = BASELINE_COLOR if value > limit else SUBJECT_COLOR
            axes.plot([max(value, _LEAST)], [row], "o", color=color, markersize=4.5, clip_on=False)
    axes.set_xlim(left=_LEAST * 0.8)
    axes.yaxis.grid(False)
    axes.xaxis.set_major_locator(LogLocator(numticks=4))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
