"""Small multiples: batch normalization against none in full, then each other arm with those two behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from batchnorm.study.plots.canvas import (
    BASELINE_COLOR,
    OTHER_COLOR,
    SOFT,
    SUBJECT_COLOR,
    Picture,
    draw,
    shown,
)
from batchnorm.study.verdicts import formatting as q
from batchnorm.study.verdicts.arms import BASELINE, SUBJECT
from batchnorm.study.verdicts.results import Epoch, Network, Run, Sample

COLUMNS = 2


@dataclass(frozen=True)
class Band:
    """Mean and spread over seeds of one arm's curve."""

    x: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def accuracy_curves(key: str, network: Network) -> Picture | None:
    """Held-out accuracy over epochs."""
    bands = _over_epochs(network, lambda epoch: epoch.test_accuracy)
    if not bands:
        return None
    ends = "; ".join(f"{arm} {q.percent(band.mean[-1])}" for arm, band in bands.items())
    alt = f"Held-out accuracy of {network.name} by epoch, each arm at its best rate. At the end: {ends}."

    def decorate(axes: Axes) -> None:
        _percent_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    return _picture(key, "Held-out accuracy, by epoch", alt, bands, decorate, "epoch")


def loss_curves(key: str, network: Network) -> Picture | None:
    """Training loss over epochs."""
    bands = _over_epochs(network, lambda epoch: epoch.train_loss)
    if not bands:
        return None
    ends = "; ".join(f"{arm} {q.significant(band.mean[-1], 2)}" for arm, band in bands.items())
    alt = f"Training loss of {network.name} by epoch, each arm at its best rate. At the end: {ends}."
    values = [mean for band in bands.values() for mean in band.mean]
    logarithmic = min(values) > 0 and max(values) / min(values) > 10

    def decorate(axes: Axes) -> None:
        if logarithmic:
            log_axis(axes)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    title = "Training loss, by epoch" + (", log scale" if logarithmic else "")
    return _picture(key, title, alt, bands, decorate, "epoch")


def accuracy_by_rate(key: str, network: Network) -> Picture | None:
    """Held-out accuracy at the end against the learning rate."""
    if len(network.rates) < 2:
        return None
    bands = {arm: _over_rates(network, arm) for arm in network.arms}
    bands = {arm: band for arm, band in bands.items() if band.x}
    if not bands:
        return None
    parts = [
        f"{arm} "
        + ", ".join(
            f"{q.percent(mean)} at {q.rate(rate)}" for rate, mean in zip(band.x, band.mean, strict=True)
        )
        for arm, band in bands.items()
    ]
    alt = f"Held-out accuracy of {network.name} at the end of training, by learning rate. {'; '.join(parts)}."
    lost = network.diverged()
    if lost:
        alt += f" {q.counted(lost, 'run')} diverged and stand at 0."

    def decorate(axes: Axes) -> None:
        axes.set_xscale("log")
        ticks = _apart(network.rates)
        axes.set_xticks(ticks, [q.rate(rate) for rate in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        margin = 0.12 * (math.log10(ticks[-1]) - math.log10(ticks[0]))
        ends = (math.log10(ticks[0]) - margin, math.log10(ticks[-1]) + margin)
        axes.set_xlim(*(10.0 ** min(max(end, -300.0), 300.0) for end in ends))
        _percent_axis(axes)

    title = "Held-out accuracy, by learning rate" + (" (diverged runs at 0)" if lost else "")
    return _picture(key, title, alt, bands, decorate, "learning rate")


def log_axis(axes: Axes) -> None:
    """A logarithmic vertical axis, labelled without markup; to be called when everything is drawn."""
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


def _picture(
    key: str, title: str, alt: str, bands: Mapping[str, Band], decorate: Callable[[Axes], None], x: str
) -> Picture:
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
            axes.set_title(
                " and ".join(map(shown, arms)) if arms is references else shown(arms[-1]), weight="bold"
            )
            axes.xaxis.grid(False)
            axes.label_outer()
        for axes in figure.axes:
            decorate(axes)
        _name_the_bottom(figure.axes, bool(references), x)
        if others and references:
            _legend(figure, references)

    return draw(key, title, alt, height, paint)


def _line(axes: Axes, band: Band, arm: str, *, leading: bool) -> None:
    color, style = {SUBJECT: (SUBJECT_COLOR, "-"), BASELINE: (BASELINE_COLOR, (0, (4, 2)))}.get(
        arm, (OTHER_COLOR, "-")
    )
    marker = "o" if leading else ""
    axes.plot(
        band.x, band.mean, color=color, linestyle=style, marker=marker, linewidth=1.6 if leading else 0.9
    )
    if leading and all(map(math.isfinite, band.std)):
        low = [mean - std for mean, std in zip(band.mean, band.std, strict=True)]
        high = [mean + std for mean, std in zip(band.mean, band.std, strict=True)]
        axes.fill_between(band.x, low, high, color=color, alpha=0.22, linewidth=0)


def _name_the_bottom(panels: Sequence[Axes], has_wide: bool, x: str) -> None:
    small = len(panels) - has_wide
    for i, axes in enumerate(panels):
        below = i + COLUMNS < len(panels) if i >= has_wide else small > 0
        axes.tick_params(labelbottom=not below)
        last_row = (len(panels) - 1 - has_wide) // COLUMNS
        if not below and (not small or (i - has_wide) // COLUMNS == last_row):
            axes.set_xlabel(x, color=SOFT, loc="right")


def _legend(figure: Figure, references: Sequence[str]) -> None:
    lines = [
        Line2D([], [], color=SUBJECT_COLOR, label=SUBJECT),
        Line2D([], [], color=BASELINE_COLOR, linestyle=(0, (4, 2)), label=BASELINE),
        Line2D([], [], color=OTHER_COLOR, marker="o", label="the panel's arm"),
    ]
    kept = [line for line in lines if line.get_label() in (*references, "the panel's arm")]
    figure.legend(
        handles=kept, loc="outside upper left", ncols=3, frameon=False, handlelength=2.2, columnspacing=1.2
    )


def _percent_axis(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _apart(rates: Sequence[float]) -> Sequence[float]:
    """The rates to be named under the axis: all, or first and last where their names would touch."""
    span = math.log(rates[-1]) - math.log(rates[0])
    gaps = [(math.log(b) - math.log(a)) / span for a, b in pairwise(rates)]
    return rates if min(gaps) > 0.3 else (rates[0], rates[-1])


def _over_epochs(network: Network, measure: Callable[[Epoch], float]) -> dict[str, Band]:
    bands = {}
    for arm in network.arms:
        runs = network.at_best(arm).values()
        found: dict[float, list[float]] = {}
        for run in runs:
            for epoch in run.epochs:
                found.setdefault(epoch.number, []).append(measure(epoch))
        band = _band(found)
        if band.x:
            bands[arm] = band
    return bands


def _over_rates(network: Network, arm: str) -> Band:
    def accuracies(runs: Mapping[int, Run]) -> list[float]:
        return [run.accuracy for run in runs.values()]

    return _band({rate: accuracies(network.at(arm, rate)) for rate in network.rates})


def _band(values: Mapping[float, list[float]]) -> Band:
    samples = {x: Sample(tuple(found)) for x, found in sorted(values.items()) if math.isfinite(x)}
    kept = {x: sample for x, sample in samples.items() if sample.finite}
    return Band(tuple(kept), tuple(s.mean for s in kept.values()), tuple(s.std for s in kept.values()))
