"""The tables and the picture of accuracy: errors against float64, by mean/std."""

from __future__ import annotations

import math
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchnorm.studies.plots import canvas
from batchnorm.studies.verdicts.formatting import power_of_ten

from .tables import Rows, table_of

_CONTRACT = 2e-6
_DASHES = ("-", "--", ":")


def accuracy_table(rows: Rows) -> str:
    """Largest error against float64, per layer, layout and mean/std."""
    return table_of(
        {"mean/std": f"{row['mean_over_std']:g}", "layout": row["layout"], "layer": row["layer"]}
        | {name: f"{row[name]:.1e}" for name in ("y", "dx", "dweight", "dbias")}
        for row in rows
    )


def accuracy_summary(rows: Rows) -> str:
    """Largest error of y, torch's and ours, per mean/std and layout."""
    return _errors_of_y(rows, "layout")


def keras_accuracy_table(rows: Rows) -> str:
    """Largest error of y in training, Keras's layer and ours, per backend."""
    return _errors_of_y(rows, "backend")


def _errors_of_y(rows: Rows, field: str) -> str:
    """Return a line per mean/std, and a column per value of the field and layer."""
    found: dict[float, dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: [*dict.fromkeys(one[field] for one in rows)].index(row[field])):
        cells = found.setdefault(row["mean_over_std"], {"mean/std": f"{row['mean_over_std']:g}"})
        cells[f"{row['layer']}, {row[field]}"] = f"{row['y']:.0e}"
    return table_of(found.values())


def picture(torch_rows: Rows, keras_rows: Rows) -> canvas.Picture:
    """Draw the error of y over mean/std: torch's and ours per layout, Keras's and ours per backend."""
    panels = (("torch", "layout", torch_rows), ("keras", "backend", keras_rows))

    def paint(figure: Figure) -> None:
        both = figure.subplots(1, 2, sharey=True)
        for axes, (stock, field, rows) in zip(both, panels, strict=True):
            _lines(axes, stock, field, rows)
        decades = [10.0**exponent for exponent in range(-8, 1, 2)]
        both[0].set_yscale("log")
        both[0].set_yticks(decades, map(power_of_ten, decades))
        both[0].set_ylim(1.5e-8, 1e3)  # the legends are above the lines
        both[0].minorticks_off()
        both[0].set_ylabel("largest error of an output")

    told = "; ".join(
        f"{name}: " + ", ".join(f"{row['y']:.0e} at {row['mean_over_std']:g}" for row in line)
        for stock, field, rows in panels
        for name, line in _by_name(stock, field, rows)
    )
    title = "Error against float64, by mean/std"
    return canvas.draw("accuracy", title, f"Largest error of y by mean/std. {told}.", 2.9, paint, width=6.3)


def _by_name(stock: str, field: str, rows: Rows) -> Iterable[tuple[str, Rows]]:
    """Yield each line of a panel, as "layer, layout" and its rows; stock's first."""
    for layer in (stock, "batchnorm"):
        for value in dict.fromkeys(row[field] for row in rows):
            yield f"{layer}, {value}", [row for row in rows if (row["layer"], row[field]) == (layer, value)]


def _lines(axes: Axes, stock: str, field: str, rows: Rows) -> None:
    """Draw the lines of a panel; what follows a value that is no number is left out, and said."""
    offsets = list(dict.fromkeys(row["mean_over_std"] for row in rows))
    number = len({row[field] for row in rows})
    for place, (name, line) in enumerate(_by_name(stock, field, rows)):
        is_stock = place < number
        color = canvas.BASELINE_COLOR if is_stock else canvas.SUBJECT_COLOR
        finite = [row for row in line if math.isfinite(row["y"])]
        label = name if is_stock else "batchnorm" if place == number else "_"  # _ is in no legend
        found = [offsets.index(row["mean_over_std"]) for row in finite], [row["y"] for row in finite]
        axes.plot(*found, _DASHES[place % number], marker="o", color=color, label=label)
        if len(finite) < len(line):
            end = (found[0][-1], found[1][-1])
            axes.annotate("then NaN", end, (5, 2), textcoords="offset points", color=color)
    axes.axhline(_CONTRACT, color=canvas.SOFT, linewidth=0.7, linestyle=":")
    axes.set_xticks(range(len(offsets)), ["0" if not one else power_of_ten(one) for one in offsets])
    axes.set_xlabel("mean / standard deviation", loc="right")
    axes.set_title({"torch": "PyTorch", "keras": "Keras"}[stock], weight="bold")
    axes.legend(frameon=False, fontsize=7.5, loc="upper left")
