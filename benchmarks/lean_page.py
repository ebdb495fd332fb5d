"""The tables and the picture of `lean`: what is held for the backward, and what a step takes."""

from __future__ import annotations

from matplotlib.figure import Figure

from batchnorm.studies.plots import canvas

from . import goals
from .tables import Rows, table, table_of, with_quartiles

_SHOWN = {  # variant -> its name, the colour of its dot, how it is filled
    "ours": ("ours", canvas.SUBJECT_COLOR, "none"),
    "lean": ("ours, lean", canvas.SUBJECT_COLOR, "full"),
    "selective": ("stock, selective checkpointing", canvas.OTHER_COLOR, "none"),
    "checkpoint": ("stock, checkpointed blocks", canvas.OTHER_COLOR, "full"),
}
_RATIOS = ("lean / ours", "lean / stock", "selective / stock", "checkpoint / stock")


def lean_table(rows: Rows) -> str:
    """Memory and time of every variant."""
    return table_of(
        {"network": row["network"], "held by stock, MB": f"{row['bytes_held']['stock'] / 1e6:.0f}"}
        | {
            f"{name} ÷ stock": f"{row['bytes_held'][name] / row['bytes_held']['stock']:.2f}"
            for name in _SHOWN
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


def picture(rows: Rows) -> canvas.Picture:
    """Draw bytes held and seconds of a step, each as a multiple of stock's, side by side."""
    panels = {"bytes_held": "memory kept for the backward", "seconds": "time of a training step"}

    def paint(figure: Figure) -> None:
        both = figure.subplots(1, len(panels), sharey=True)
        for axes, (what, name) in zip(both, panels.items(), strict=True):
            lines = []
            for variant, (label, color, fill) in _SHOWN.items():
                found = [row[what][variant] / row[what]["stock"] for row in rows]
                look = {"color": color, "fillstyle": fill, "markersize": 5, "label": label}
                lines += axes.plot(found, range(len(rows)), "o", clip_on=False, **look)
            axes.axvline(1, color=canvas.BASELINE_COLOR, linewidth=1)
            axes.set_xlim(left=0)
            axes.set_xlabel("÷ stock", loc="right")
            axes.set_title(name, weight="bold")
        both[0].set_yticks(range(len(rows)), [row["network"] for row in rows])
        both[0].invert_yaxis()
        canvas.legend(figure, lines, 2, 1.0)

    told = "; ".join(
        f"{row['network']}: "
        + ", ".join(
            f"{label} {row['bytes_held'][name] / row['bytes_held']['stock']:.2f} of the memory"
            f" and {row['seconds'][name] / row['seconds']['stock']:.2f} of the time"
            for name, (label, *_) in _SHOWN.items()
        )
        for row in rows
    )
    title = "lean: memory and time, as multiples of stock's"
    return canvas.draw("lean", title, f"{told}.", 1.2 + 0.24 * len(rows), paint, width=6.3)
