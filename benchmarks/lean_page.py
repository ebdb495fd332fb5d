"""The tables and the picture of `lean`: what is held for the backward, and what a step takes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import goals
from .pictures import save
from .tables import Rows, table, table_of, with_quartiles

PICTURE = Path(__file__).parent.parent / "docs" / "lean.svg"
_SHOWN = {  # variant -> its name, colour
    "stock": ("stock", "#9aa5b1"),
    "ours": ("ours", "#1d4ed8"),
    "lean": ("ours, lean", "#c2410c"),
    "selective": ("stock, selective checkpointing", "#94d2bd"),
    "checkpoint": ("stock, checkpointed blocks", "#0f766e"),
}
_RATIOS = ("lean / ours", "lean / stock", "selective / stock", "checkpoint / stock")


def lean_table(rows: Rows) -> str:
    """Memory and time of every variant."""
    return table_of(
        {"network": row["network"], "held by stock, MB": f"{row['bytes_held']['stock'] / 1e6:.0f}"}
        | {
            f"{name} ÷ stock": f"{row['bytes_held'][name] / row['bytes_held']['stock']:.2f}"
            for name in _SHOWN
            if name != "stock"
        }
        | {
            "tensors alone, lean ÷ stock": (
                f"{row['bytes_allocated']['lean'] / row['bytes_allocated']['stock']:.2f}"
            ),
            "a step of stock, ms": f"{row['seconds']['stock'] * 1e3:.0f}",
        }
        | {f"time, {name.replace('/', '÷')}": with_quartiles(row["ratios"][name]) for name in _RATIOS}
        for row in rows
    )


def goals_table(rows: Rows) -> str:
    """Each goal, and what was found."""
    return table(
        ("", "goal", "found", ""),
        [
            (found.what, found.asked, f"{found.found:.2f}", "reached" if found.reached else "**missed**")
            for found in goals.lean_findings(rows)
        ],
    )


def draw(rows: Rows, path: Path = PICTURE) -> None:
    """Draw bytes held and seconds of a step, each as a multiple of stock's, side by side."""
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    memory, time = figure.subplots(1, 2, sharey=True)
    _bars(memory, rows, "bytes_held", "held for the backward, ÷ stock")
    _bars(time, rows, "seconds", "time of a training step, ÷ stock")
    memory.set_yticks(range(len(rows)), [row["network"] for row in rows])
    memory.invert_yaxis()
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=len(_SHOWN))
    save(figure, path)


def _bars(axes: Axes, rows: Rows, what: str, label: str) -> None:
    height = 0.8 / (len(_SHOWN) - 1)
    variants = [name for name in _SHOWN if name != "stock"]
    for place, name in enumerate(variants):
        shown, colour = _SHOWN[name]
        axes.barh(
            [number + (place - (len(variants) - 1) / 2) * height for number in range(len(rows))],
            [row[what][name] / row[what]["stock"] for row in rows],
            height,
            color=colour,
            label=shown,
        )
    axes.axvline(1, color=_SHOWN["stock"][1], linewidth=1.2, label="stock")
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.grid(visible=True, axis="x", color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
