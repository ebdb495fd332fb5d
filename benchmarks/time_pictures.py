"""Pictures of times on a CPU: layers, a dot a shape, and whole training steps; stock's time ÷ ours."""

from __future__ import annotations

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from batchnorm.studies.plots import canvas
from batchnorm.studies.verdicts.formatting import power_of_ten

from .layer_cases import EVALUATION, FORWARD_AND_BACKWARD, INFERENCE
from .tables import Row, Rows

_PANELS = {"training": FORWARD_AND_BACKWARD, "evaluation": (*EVALUATION, *INFERENCE)}
_LAYOUTS = {"contiguous": canvas.SUBJECT_COLOR, "channels-last": canvas.OTHER_COLOR}
_RATIO = "stock / ours"
_TICKS, _VALUES = (0.8, 1, 1.5, 2, 3, 4), (1e3, 1e4, 1e5, 1e6, 1e7)
_FORMS = {"drop-in": "full", "fused": "none"}  # of ours in small networks -> how its dot is filled


def layers(rows: Rows) -> canvas.Picture:
    """Draw stock ÷ ours of each case over its number of values, on a line where both take as long."""

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, len(_PANELS), sharey=True)
        for axes, (name, operations) in zip(panels, _PANELS.items(), strict=True):
            for row in _of(rows, operations):
                fill = "full" if row["dtype"] == "float32" else "none"
                axes.plot(
                    row["values"],
                    _median(row),
                    "o",
                    color=_LAYOUTS[row["layout"]],
                    fillstyle=fill,
                    alpha=0.85,
                )
            axes.axhline(1, color=canvas.BASELINE_COLOR, linewidth=1)
            axes.set_xscale("log")
            axes.set_xticks(_VALUES, map(power_of_ten, _VALUES))
            axes.minorticks_off()
            axes.set_xlabel("values of the tensor", loc="right")
            axes.set_title(name, weight="bold")
        panels[0].set_yscale("log")
        panels[0].set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        panels[0].minorticks_off()
        panels[0].set_ylabel("stock ÷ ours")
        dots = [_dot(color, "full", f"float32, {layout}") for layout, color in _LAYOUTS.items()]
        canvas.legend(figure, [*dots, _dot(canvas.SUBJECT_COLOR, "none", "16 bits")], 3, 1.0)

    told = "; ".join(_layers_told(name, _of(rows, operations)) for name, operations in _PANELS.items())
    title = "Layers on a CPU: stock's time ÷ ours"
    return canvas.draw("layer-time", title, f"{title}, a dot a case. {told}.", 3.0, paint, width=6.3)


def steps(large: Rows, small: Rows) -> canvas.Picture:
    """Draw a row per network: the median of stock ÷ ours, and its quartiles."""
    lines = [(f"{row['network']}, {row['layout']}", {"fused": row["ratios"][_RATIO]}) for row in large]
    for row in small:
        if row["threads"] == 1:
            forms = {
                form: row["ratios"][f"stock / {form}"]
                for form in _FORMS
                if f"stock / {form}" in row["ratios"]
            }
            lines.append((f"{row['network']}, one thread", forms))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (_, forms) in enumerate(lines):
            for form, ratio in forms.items():
                row = place if len(forms) == 1 else place + (-0.16 if form == "drop-in" else 0.16)
                _with_quartiles(axes, row, ratio, "none" if form == "fused" else "full")
        axes.axvline(1, color=canvas.BASELINE_COLOR, linewidth=1)
        axes.set_yticks(range(len(lines)), [name for name, _ in lines])
        axes.invert_yaxis()
        axes.yaxis.grid(False)
        axes.set_xlabel("stock ÷ ours; the line is over the middle half of the rounds", loc="right")
        dots = [_dot(canvas.SUBJECT_COLOR, fill, form) for form, fill in _FORMS.items()]
        canvas.legend(figure, dots, 2, 1.0)

    told = "; ".join(
        f"{name}: " + ", ".join(f"{form} {ratio['median']:.2f}" for form, ratio in forms.items())
        for name, forms in lines
    )
    title = "Whole training steps on a CPU: stock's time ÷ ours"
    return canvas.draw("step-time", title, f"{title}. {told}.", 0.9 + 0.25 * len(lines), paint, width=6.3)


def _of(rows: Rows, operations: tuple[str, ...]) -> Rows:
    return [row for row in rows if row["operation"] in operations]


def _median(row: Row) -> float:
    return float(row["ratios"][_RATIO]["median"])


def _layers_told(name: str, rows: Rows) -> str:
    found = [_median(row) for row in rows]
    slower = sum(ratio < 1 for ratio in found)
    mean = statistics.geometric_mean(found)
    least, most = min(found), max(found)
    return f"{name}: {len(found)} cases, mean {mean:.2f}, from {least:.2f} to {most:.2f}, {slower} below 1"


def _with_quartiles(axes: Axes, row: float, ratio: Row, fill: str) -> None:
    axes.plot(ratio["quartiles"], [row, row], color=canvas.SUBJECT_COLOR, linewidth=2.4, alpha=0.45)
    axes.plot(ratio["median"], row, "o", color=canvas.SUBJECT_COLOR, fillstyle=fill, markersize=4.5)


def _dot(color: str, fill: str, label: str) -> Line2D:
    return Line2D([], [], color=color, marker="o", linestyle="none", fillstyle=fill, label=label)
