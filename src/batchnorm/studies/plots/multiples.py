"""Small multiples: batch normalization against none in full, then each other arm with those two behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from batchnorm.studies.records import Epoch
from batchnorm.studies.verdicts import formatting as q
from batchnorm.studies.verdicts.results import BASELINE, SUBJECT, Network

from .canvas import INK, SOFT, Dash, Picture, color_name, color_of, draw, legend, shown, ticks
from .values import Band, Curve, Style, Values

COLUMNS = 2
DASH = (4, 2)  # of the plain network's line


def accuracy_curves(key: str, network: Network) -> Picture | None:
    """Held-out accuracy over epochs."""
    values = _over_epochs(network, "held-out accuracy", lambda epoch: epoch.test_accuracy)
    bands = values.bands()
    if not bands:
        return None
    ends = "; ".join(f"{arm} {q.percent(_means(band)[-1])}" for arm, band in bands.items())
    alt = f"Held-out accuracy of {network.name} by epoch, each arm at its best rate. At the end: {ends}."

    def decorate(axes: Axes) -> None:
        percent_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    return bands_picture(key, "Held-out accuracy, by epoch", alt, replace(values, percent=True), decorate)


def loss_curves(key: str, network: Network) -> Picture | None:
    """Training loss over epochs."""
    values = _over_epochs(network, "training loss", lambda epoch: epoch.train_loss)
    bands = values.bands()
    if not bands:
        return None
    ends = "; ".join(f"{arm} {q.significant(_means(band)[-1], 2)}" for arm, band in bands.items())
    alt = f"Training loss of {network.name} by epoch, each arm at its best rate. At the end: {ends}."
    means = [mean for band in bands.values() for mean in _means(band)]
    logarithmic = min(means) > 0 and max(means) / min(means) > 10

    def decorate(axes: Axes) -> None:
        if logarithmic:
            log_axis(axes)
        else:
            ticks(axes.yaxis, 4, "{x:g}", steps=[1, 2, 5, 10])
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    return bands_picture(key, "Training loss, by epoch", alt, replace(values, log_y=logarithmic), decorate)


def accuracy_by_rate(key: str, network: Network) -> Picture | None:
    """Held-out accuracy at the end against the learning rate."""
    if len(network.rates) < 2:
        return None
    found: dict[tuple[str, int], dict[float, float]] = {}
    for run in network.runs:
        found.setdefault((run.arm, run.seed), {})[run.learning_rate] = run.accuracy
    curves = [
        Curve((arm, seed), [of[rate] for rate in sorted(of)], sorted(of), style=style_of(arm))
        for (arm, seed), of in sorted(found.items(), key=lambda one: network.arms.index(one[0][0]))
    ]
    values = Values(
        ("arm", "seed"),
        "held-out accuracy",
        curves,
        "learning rate",
        percent=True,
        log_x=True,
    )
    bands = values.bands()
    if not bands:
        return None
    parts = [
        f"{arm} {', '.join(f'{q.percent(sample.mean)} at {q.rate(x)}' for x, sample in band.items())}"
        for arm, band in bands.items()
    ]
    alt = f"Held-out accuracy of {network.name} at the end of training, by learning rate. {'; '.join(parts)}."
    if lost := network.diverged():
        alt += f" {q.counted(lost, 'run')} diverged and stand at 0."

    def decorate(axes: Axes) -> None:
        axes.set_xscale("log")
        ticks = _apart(network.rates)
        axes.set_xticks(ticks, [q.rate(rate) for rate in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        margin = 0.12 * (math.log10(ticks[-1]) - math.log10(ticks[0]))
        ends = (math.log10(ticks[0]) - margin, math.log10(ticks[-1]) + margin)
        axes.set_xlim(*(10.0 ** min(max(end, -300.0), 300.0) for end in ends))
        percent_axis(axes)

    title = "Held-out accuracy, by learning rate" + (" (diverged runs at 0)" if lost else "")
    return bands_picture(key, title, alt, values, decorate)


def log_axis(axes: Axes) -> None:
    """Makes the vertical axis logarithmic, labelled without markup; called when everything is drawn."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    exponents = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    if len(exponents) > 2:
        stride = math.ceil(len(exponents) / 5)
        ticks = [10.0**exponent for exponent in exponents[::stride]]
        labels = [q.power_of_ten(tick) for tick in ticks]
    else:
        span = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        round_numbers = [digit * 10.0**exponent for exponent in span for digit in (1, 2, 5)]
        ticks = [number for number in round_numbers if low <= number <= high]
        labels = [q.significant(tick, 1) for tick in ticks]
    axes.set_yticks(ticks, labels)
    axes.yaxis.set_minor_locator(NullLocator())


def bands_picture(
    key: str, title: str, alt: str, values: Values, decorate: Callable[[Axes], None]
) -> Picture:
    """Draws bands: batch normalization and none in a wide panel, each other arm with them in a small one."""
    bands = values.bands()
    references = [arm for arm in (SUBJECT, BASELINE) if arm in bands]
    others = [arm for arm in bands if arm not in references]
    rows = math.ceil(len(others) / COLUMNS)
    height = 0.55 + (1.55 if references else 0) + 1.05 * rows

    def paint(figure: Figure) -> None:
        ratios = ([1.5] if references else []) + [1.0] * rows
        grid = figure.add_gridspec(len(ratios), COLUMNS, height_ratios=ratios)
        panels = [(grid[0, :], references)] if references else []
        first = len(panels)
        panels += [
            (grid[first + i // COLUMNS, i % COLUMNS], [*references, arm]) for i, arm in enumerate(others)
        ]
        shared: Axes | None = None
        for place, arms in panels:
            axes = figure.add_subplot(place, sharex=shared, sharey=shared)
            shared = shared or axes
            for arm in arms:
                _line(axes, bands[arm], arm, leading=arms is references or arm not in references)
            if arms is references:
                axes.set_title(" and ".join(map(shown, arms)), weight="bold")
            else:
                axes.set_title(shown(arms[-1]), weight="bold", color=color_of(arms[-1]))
            axes.xaxis.grid(False)
            axes.label_outer()
        for axes in figure.axes:
            decorate(axes)
        _name_the_bottom(figure.axes, bool(references), values.x or "")
        if references:
            _legend(figure, references, "the title's arm" if others else "")

    return draw(key, title, alt, height, paint, values=values)


def _line(axes: Axes, band: Band, arm: str, *, leading: bool) -> None:
    marker, width = ("o", 1.6) if leading else ("", 0.9)
    x, color, style = list(band), color_of(arm), _style(arm)
    axes.plot(x, _means(band), color=color, linestyle=style, marker=marker, linewidth=width)
    if leading and all(math.isfinite(sample.std) for sample in band.values()):
        low, high = ([sample.mean + side * sample.std for sample in band.values()] for side in (-1, 1))
        axes.fill_between(x, low, high, color=color, alpha=0.22, linewidth=0)


def _means(band: Band) -> list[float]:
    return [sample.mean for sample in band.values()]


def _style(arm: str) -> Dash:
    return (0, DASH) if arm == BASELINE else "-"


def style_of(arm: str) -> Style:
    """Returns the look of an arm's line, the same in every picture."""
    return Style(color_name(arm), dash=DASH if arm == BASELINE else ())


def _name_the_bottom(panels: Sequence[Axes], has_wide: bool, x: str) -> None:
    small = len(panels) - has_wide
    for i, axes in enumerate(panels):
        below = i + COLUMNS < len(panels) if i >= has_wide else small > 0
        axes.tick_params(labelbottom=not below)
        last_row = (len(panels) - 1 - has_wide) // COLUMNS
        if not below and (not small or (i - has_wide) // COLUMNS == last_row):
            axes.set_xlabel(x, color=SOFT, loc="right")


def _legend(figure: Figure, references: Sequence[str], others: str) -> None:
    lines = [Line2D([], [], color=color_of(arm), linestyle=_style(arm), label=arm) for arm in references]
    if others:
        lines.append(Line2D([], [], color=INK, marker="o", label=others))
    legend(figure, lines, 3, 2.2)


def percent_axis(axes: Axes) -> None:
    """Labels the vertical axis in percent."""
    ticks(axes.yaxis, 4, lambda value: f"{100 * value:g} %", steps=[1, 2, 2.5, 5, 10])


def _apart(rates: Sequence[float]) -> Sequence[float]:
    """Returns the rates to name under the axis: all, or first and last where names would touch."""
    span = math.log(rates[-1]) - math.log(rates[0])
    gaps = [(math.log(b) - math.log(a)) / span for a, b in pairwise(rates)]
    return rates if min(gaps) > 0.3 else (rates[0], rates[-1])


def _over_epochs(network: Network, y: str, measure: Callable[[Epoch], float]) -> Values:
    curves = [
        Curve(
            (arm, seed),
            [measure(epoch) for epoch in run.epochs],
            [epoch.epoch for epoch in run.epochs],
            style=style_of(arm),
        )
        for arm in network.arms
        for seed, run in network.at_best(arm).items()
    ]
    return Values(("arm", "seed"), y, curves, "epoch")
