"""Pictures of what goes on inside a network: gradients by layer, and inputs of layers that move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from batchnorm.study.plots.canvas import (
    BASELINE_COLOR,
    OTHER_COLOR,
    SOFT,
    SUBJECT_COLOR,
    Picture,
    draw,
    shown,
)
from batchnorm.study.plots.multiples import log_axis
from batchnorm.study.verdicts import formatting as q
from batchnorm.study.verdicts.arms import BASELINE, SUBJECT
from batchnorm.study.verdicts.internals import log_gradient_ratio, moving_layers, total_drift
from batchnorm.study.verdicts.results import Network, Run, Sample

# First layer to last: mid-tones that stand out from white and from black, and differ in lightness too.
FIRST, LAST = (0xD5, 0x5E, 0x00), (0x4A, 0x7F, 0xE0)
MOST_POINTS = 60
MOST_LAYERS = 3


def gradient_norms(key: str, network: Network) -> Picture | None:
    """Gradient norm of each layer over training, with and without batch normalization."""
    panels = {}
    for arm in _shown_arms(network):
        runs = list(network.at_best(arm).values())
        layers = list(dict.fromkeys(layer for run in runs for layer in run.gradients))
        lines = {
            layer: _mean_line(
                [_pairs(run, layer) for run in runs if layer in run.gradients], logarithmic=True
            )
            for layer in layers
        }
        lines = {layer: line for layer, line in lines.items() if line}
        if lines:
            panels[arm] = lines
    if not panels:
        return None
    told = []
    for arm in panels:
        logs = Sample(tuple(log_gradient_ratio(run) for run in network.at_best(arm).values()))
        if logs.finite:
            told.append(f"{arm} {q.times(math.exp(logs.mean))}")
    alt = (
        f"Gradient norm of each layer of {network.name} over training steps, log scale, each arm at its best "
        f"rate. First layer over last, median over training: {'; '.join(told) or 'not known'}."
    )
    depth = max(len(lines) for lines in panels.values())

    def paint(figure: Figure) -> None:
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
        for axes, (arm, lines) in zip(grid[0], panels.items(), strict=True):
            for i, line in enumerate(lines.values()):
                at_end = i in (0, len(lines) - 1)
                axes.plot(
                    *zip(*line, strict=True), color=_shade(i, len(lines)), linewidth=1.8 if at_end else 0.9
                )
            axes.set_title(shown(arm), weight="bold")
            axes.xaxis.grid(False)
            _step_axis(axes)
        log_axis(grid[0, 0])
        grid[0, -1].set_xlabel("training steps", loc="right")
        names = list(next(iter(panels.values())))
        _ends_of_a_scale(figure, names, depth)

    return draw(key, "Gradient norm of each layer, log scale", alt, 2.35, paint)


def input_drift(key: str, network: Network) -> Picture | None:
    """Mean and spread of the inputs of hidden layers over training."""
    panels = {}
    for arm in _shown_arms(network):
        runs = [run for run in network.at_best(arm).values() if moving_layers(run)]
        if runs:
            panels[arm] = runs
    if not panels:
        return None
    names = _some(
        list(dict.fromkeys(name for runs in panels.values() for run in runs for name in moving_layers(run)))
    )
    told = []
    for arm, runs in panels.items():
        sample = Sample(tuple(total_drift(run) for run in runs))
        if sample.finite:
            told.append(f"{arm} {q.spread(sample, q.times)}")
    alt = (
        f"Mean and spread of the inputs of hidden layers of {network.name} over training steps, "
        "each arm at its best rate. Average distance from the start, in standard deviations: "
        f"{'; '.join(told) or 'not known'}."
    )

    def paint(figure: Figure) -> None:
        grid = figure.subplots(len(names), len(panels), sharex="col", sharey="row", squeeze=False)
        for column, (arm, runs) in enumerate(panels.items()):
            for row, layer in enumerate(names):
                axes = grid[row, column]
                _drift_of(axes, runs, layer, _color(arm))
                axes.set_title(shown(layer), color=SOFT)
                axes.xaxis.grid(False)
                axes.yaxis.set_major_locator(MaxNLocator(3))
                axes.yaxis.set_major_formatter(
                    FuncFormatter(lambda value, _: f"{value:g}".replace("-", q.MINUS))
                )
                _step_axis(axes)
            grid[0, column].set_title(f"{shown(arm)}: {shown(names[0], 14)}", weight="bold")
        grid[-1, -1].set_xlabel("training steps", loc="right")

    return draw(
        key,
        "Inputs of hidden layers: mean ± spread over units and examples",
        alt,
        0.5 + 0.95 * len(names),
        paint,
    )


def _shown_arms(network: Network) -> list[str]:
    return [arm for arm in (BASELINE, SUBJECT) if arm in network.arms] or list(network.arms[:2])


def _pairs(run: Run, layer: str) -> list[tuple[float, float]]:
    series = run.gradients[layer]
    return list(zip(series.steps, series.values, strict=True))


def _mean_line(
    runs: Sequence[Sequence[tuple[float, float]]], *, logarithmic: bool
) -> list[tuple[float, float]]:
    """Mean over runs at each step, thinned; geometric for what is shown on a log scale."""
    into: Callable[[float], float] = math.log if logarithmic else float
    back: Callable[[float], float] = math.exp if logarithmic else float
    found: dict[float, list[float]] = {}
    for line in runs:
        for step, value in line:
            if math.isfinite(step) and math.isfinite(value) and (value > 0 or not logarithmic):
                found.setdefault(step, []).append(into(value))
    means = [(step, back(sum(values) / len(values))) for step, values in sorted(found.items())]
    return means[:: math.ceil(len(means) / MOST_POINTS)] if means else []


def _drift_of(axes: Axes, runs: Iterable[Run], layer: str, color: str) -> None:
    found = [run.drift[layer] for run in runs if layer in run.drift]
    mean = dict(_mean_line([list(zip(d.steps, d.mean, strict=True)) for d in found], logarithmic=False))
    std = dict(_mean_line([list(zip(d.steps, d.std, strict=True)) for d in found], logarithmic=False))
    steps = [step for step in mean if step in std]
    if not steps:
        return
    axes.fill_between(
        steps,
        [mean[step] - std[step] for step in steps],
        [mean[step] + std[step] for step in steps],
        color=color,
        alpha=0.25,
        linewidth=0,
    )
    axes.axhline(mean[steps[0]], color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.plot(steps, [mean[step] for step in steps], color=color)


def _some(names: list[str]) -> list[str]:
    """First, middle and last of many."""
    if len(names) <= MOST_LAYERS:
        return names
    return [names[0], names[len(names) // 2], names[-1]]


def _ends_of_a_scale(figure: Figure, names: Sequence[str], depth: int) -> None:
    lines = [
        Line2D([], [], color=_shade(0, depth), linewidth=2.2, label=f"first layer ({shown(names[0], 14)})")
    ]
    if depth > 1:
        lines.append(
            Line2D(
                [], [], color=_shade(depth - 1, depth), linewidth=2.2, label=f"last ({shown(names[-1], 14)})"
            )
        )
    figure.legend(
        handles=lines, loc="outside upper left", ncols=2, frameon=False, handlelength=1.6, columnspacing=1.2
    )


def _shade(i: int, count: int) -> str:
    share = i / max(count - 1, 1)
    mixed = (round(a + share * (b - a)) for a, b in zip(FIRST, LAST, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _color(arm: str) -> str:
    return {SUBJECT: SUBJECT_COLOR, BASELINE: BASELINE_COLOR}.get(arm, OTHER_COLOR)


def _step_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
