"""Pictures of what goes on inside a network: gradients by layer, and inputs of layers that move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from batchnorm.studies.records import Run
from batchnorm.studies.verdicts import formatting as q
from batchnorm.studies.verdicts.internals import moving_layers, total_drift, typical_gradient_ratio
from batchnorm.studies.verdicts.results import BASELINE, SUBJECT, Network, Sample

from .canvas import INK, SOFT, Picture, color_name, color_of, draw, legend, shown, ticks
from .multiples import log_axis, style_of
from .values import Curve, Style, Values

MOST_POINTS = 60
MOST_LAYERS = 3

Line = dict[float, float]  # values by step


def gradient_norms(key: str, network: Network) -> Picture | None:
    """Gradient norm of each layer over training, with and without batch normalization."""
    values = _norms_of_gradients(network)
    panels: dict[str, dict[str, Line]] = {}
    told = []
    for arm in _shown_arms(network):
        lines = {
            layer: _mean_line(
                ((curve.x, curve.y) for curve in values.curves if curve.labels[:2] == (arm, layer)),
                into=lambda value: math.log(value) if value > 0 else math.nan,
                back=math.exp,
            )
            for layer in dict.fromkeys(
                str(curve.labels[1]) for curve in values.curves if curve.labels[0] == arm
            )
        }
        if drawn := {layer: line for layer, line in lines.items() if line}:
            panels[arm] = drawn
            ratio = typical_gradient_ratio(network.at_best(arm))
            told += [f"{arm} {q.times(ratio)}"] if math.isfinite(ratio) else []
    if not panels:
        return None
    alt = (
        f"Gradient norm of each layer of {network.name} over training steps, log scale, each arm at its best "
        f"rate. First layer over last, median over training: {'; '.join(told) or 'not known'}."
    )

    def paint(figure: Figure) -> None:
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
        for axes, (arm, lines) in zip(grid[0], panels.items(), strict=True):
            for i, line in enumerate(lines.values()):
                width = 1.8 if i in (0, len(lines) - 1) else 0.9
                look: dict[str, Any] = {"color": color_of(arm), "alpha": _alpha(i, len(lines))}
                axes.plot(*zip(*line.items(), strict=True), linewidth=width, **look)
            axes.set_title(shown(arm), weight="bold", color=color_of(arm))
            _step_axis(axes)
        log_axis(grid[0, 0])
        grid[0, -1].set_xlabel("training steps", loc="right")
        names = [shown(name, 14) for name in next(iter(panels.values()))]
        ends = {0: f"first layer ({names[0]})", max(map(len, panels.values())) - 1: f"last ({names[-1]})"}
        ends = ends if len(ends) > 1 else {0: f"first layer ({names[0]})"}
        named = [
            Line2D([], [], color=INK, alpha=_alpha(i, max(ends) + 1), linewidth=2.2, label=ends[i])
            for i in ends
        ]
        legend(figure, named, 2, 1.6)

    return draw(key, "Gradient norm of each layer, log scale", alt, 2.35, paint, values=values)


def _norms_of_gradients(network: Network) -> Values:
    """Returns the gradient norms of each layer by arm and seed, thinned; the first layer is the strongest."""
    curves = []
    for arm in _shown_arms(network):
        runs = network.at_best(arm)
        layers = list(dict.fromkeys(layer for run in runs.values() for layer in run.gradient_norm.layers))
        for i, layer in enumerate(layers):
            style = Style(color_name(arm), _alpha(i, len(layers)))
            for seed, run in runs.items():
                norms = run.gradient_norm
                if layer in norms.layers:
                    stride = math.ceil(len(norms.steps) / MOST_POINTS) or 1
                    curves.append(
                        Curve(
                            (arm, layer, seed),
                            norms.layers[layer][::stride],
                            norms.steps[::stride],
                            style=style,
                        )
                    )
    return Values(
        ("arm", "layer", "seed"),
        "gradient norm",
        curves,
        "training step",
        series="layer",
        panel="arm",
        log_y=True,
        geometric=True,
    )


def input_drift(key: str, network: Network) -> Picture | None:
    """Mean and spread of the inputs of hidden layers over training."""
    found = {
        arm: {seed: run for seed, run in network.at_best(arm).items() if moving_layers(run)}
        for arm in _shown_arms(network)
    }
    panels = {arm: runs for arm, runs in found.items() if runs}
    if not panels:
        return None
    names = _some(
        list(
            dict.fromkeys(
                name for runs in panels.values() for run in runs.values() for name in moving_layers(run)
            )
        )
    )
    drifts = {arm: Sample([total_drift(run) for run in runs.values()]) for arm, runs in panels.items()}
    told = "; ".join(f"{arm} {q.spread(drift, q.times)}" for arm, drift in drifts.items() if drift.finite)
    alt = (
        f"Mean and spread of the inputs of hidden layers of {network.name} over training steps, "
        "each arm at its best rate. Average distance from the start, in standard deviations: "
        f"{told or 'not known'}."
    )

    def paint(figure: Figure) -> None:
        grid = figure.subplots(len(names), len(panels), sharex="col", sharey="row", squeeze=False)
        for column, (arm, runs) in enumerate(panels.items()):
            for axes, layer in zip(grid[:, column], names, strict=True):
                _drift_of(axes, runs.values(), layer, color_of(arm))
                axes.set_title(shown(layer), color=SOFT)
                ticks(axes.yaxis, 3, "{x:g}")
                _step_axis(axes)
            grid[0, column].set_title(f"{shown(arm)}: {shown(names[0], 14)}", weight="bold")
        grid[-1, -1].set_xlabel("training steps", loc="right")

    values = Values(
        ("layer", "arm", "seed"),
        "input of the layer",
        _inputs(panels, names),
        "training step",
        panel="layer",
        band="spread",
    )
    title = "Inputs of hidden layers: mean ± spread over units and examples"
    return draw(key, title, alt, 0.5 + 0.95 * len(names), paint, values=values)


def _inputs(panels: Mapping[str, Mapping[int, Run]], names: Sequence[str]) -> list[Curve]:
    curves = []
    for layer in names:
        for arm, runs in panels.items():
            for seed, run in runs.items():
                drift = run.input_drift
                if layer in drift.layers:
                    kept = slice(None, None, math.ceil(len(drift.steps) / MOST_POINTS) or 1)
                    moments = drift.layers[layer]
                    curves.append(
                        Curve(
                            (layer, arm, seed),
                            moments.mean[kept],
                            drift.steps[kept],
                            moments.std[kept],
                            style_of(arm),
                        )
                    )
    return curves


def _shown_arms(network: Network) -> list[str]:
    return [arm for arm in (BASELINE, SUBJECT) if arm in network.arms] or list(network.arms[:2])


def _mean_line(
    runs: Iterable[tuple[Sequence[float], Sequence[float]]],
    into: Callable[[float], float] = float,
    back: Callable[[float], float] = float,
) -> Line:
    """Returns the mean over runs at each step, thinned; geometric with `into` log and `back` exp."""
    found: dict[float, list[float]] = {}
    for steps, values in runs:
        for step, value in zip(steps, map(into, values), strict=True):
            if math.isfinite(value):
                found.setdefault(step, []).append(value)
    kept = sorted(found)[:: math.ceil(len(found) / MOST_POINTS) or 1]
    return {step: back(sum(found[step]) / len(found[step])) for step in kept}


def _drift_of(axes: Axes, runs: Iterable[Run], layer: str, color: str) -> None:
    drifts = [
        (run.input_drift.steps, run.input_drift.layers[layer])
        for run in runs
        if layer in run.input_drift.layers
    ]
    mean, std = (
        _mean_line((steps, getattr(moments, name)) for steps, moments in drifts) for name in ("mean", "std")
    )
    steps = [step for step in mean if step in std]
    if not steps:
        return
    low, high = ([mean[step] + side * std[step] for step in steps] for side in (-1, 1))
    axes.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
    axes.axhline(mean[steps[0]], color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.plot(steps, [mean[step] for step in steps], color=color)


def _some(names: list[str]) -> list[str]:
    """Returns first, middle and last of many."""
    if len(names) <= MOST_LAYERS:
        return names
    return [names[0], names[len(names) // 2], names[-1]]


def _alpha(i: int, count: int) -> float:
    """Returns how strong the line of layer i of so many is: the first is the strongest."""
    return 1.0 - 0.7 * i / max(count - 1, 1)


def _step_axis(axes: Axes) -> None:
    axes.xaxis.grid(False)
    ticks(axes.xaxis, 3, "{x:,.0f}", integer=True)
