"""Draws the speed of layers over the size of the tensor, beside that of a copy."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from .pictures import save
from .tables import Rows

PICTURE = Path(__file__).parent.parent / "docs" / "layer-time.svg"
_SMALL = 10**5  # bytes up to which time is all Python's
_SHOWN = (  # rival, layout, mark, colour
    ("stock", "contiguous", "o", "#9aa5b1"),
    ("stock", "channels-last", "s", "#9aa5b1"),
    ("ours", "contiguous", "o", "#c2410c"),
    ("ours", "channels-last", "s", "#1d4ed8"),
)


def draw(rows: Rows, path: Path = PICTURE) -> None:
    """Draw GB/s over the tensor's size, norm → ReLU in float32; bytes are those that must be moved."""
    shown = [
        row
        for row in rows
        if (row["operation"], row["dtype"]) == ("norm-relu", "float32") and row["tensor_bytes"] > _SMALL
    ]
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.subplots()
    copies: dict[int, list[float]] = {}
    for row in shown:
        size = row["tensor_bytes"]
        copies.setdefault(size, []).append(2 * size / row["copy_seconds"]["copy"] / 1e9)
    sizes = sorted(copies)
    axes.plot(
        [size / 1e6 for size in sizes],
        [statistics.median(copies[size]) for size in sizes],
        color="#111827",
        linewidth=1,
        linestyle="--",
        label="a copy",
    )
    for rival, layout, mark, colour in _SHOWN:
        points = [row for row in shown if row["layout"] == layout]
        axes.scatter(
            [row["tensor_bytes"] / 1e6 for row in points],
            [row["rivals"][rival]["gigabytes_per_second"] for row in points],
            marker=mark,
            s=34,
            color=colour,
            alpha=0.85,
            label=f"{rival}, {layout}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_yticks([3, 10, 30, 100])
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("tensor, MB")
    axes.set_ylabel("GB/s of the bytes that must be moved")
    axes.set_title("norm → ReLU, forward and backward, float32", loc="left", fontsize=11)
    axes.grid(visible=True, which="major", color="#e5e7eb", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    save(figure, path)
