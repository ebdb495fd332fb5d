"""The tables of docs/benchmarks.md, made from the result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .results_file import load

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
_INTRO = """# Benchmarks

Made by `make bench` from `benchmarks/results/`; do not edit by hand. Machines are shared and noisy: rivals
are interleaved in one process, and ratios are medians of pairs.
"""


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    """Largest error against float64, per layer, layout and mean/std."""
    header = ("mean/std", "layout", "layer", "y", "dx", "dweight", "dbias")
    return _table(
        header,
        [
            (f"{row['mean_over_std']:g}", row["layout"], row["layer"], *(f"{row[k]:.1e}" for k in header[3:]))
            for row in rows
        ],
    )


def layer_time_table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of norm → ReLU, forward and backward, and the ratio to stock."""
    header = ("shape", "layout", "stock, ms", "ours, ms", "stock ÷ ours", "from – to")
    return _table(
        header,
        [
            (
                str(tuple(row["shape"])),
                row["layout"],
                f"{row['stock_seconds'] * 1e3:.2f}",
                f"{row['seconds'] * 1e3:.2f}",
                f"{row['stock_over_ours']:.2f}",
                "{:.2f} – {:.2f}".format(*row["stock_over_ours_range"]),
            )
            for row in rows
        ],
    )


TABLES = {"accuracy-cpu": accuracy_table, "layer-time-cpu": layer_time_table}
_TITLES = {
    "accuracy-cpu": "## Accuracy\n\n"
    "Largest |found − float64| / (1 + max |float64|), dx in units of 1/std, float32, shape (16, 8, 32, 32).\n"
    "The contract is 2e-6 for any mean/std up to 1e6, in every layout.",
    "layer-time-cpu": "## Time of norm → ReLU, forward and backward, float32\n\n"
    "The eager engine of plain torch operations: exact, and not yet fast.",
}


def text() -> str:
    """Return the page, from the result files as they are."""
    parts = [_INTRO]
    for name, table in TABLES.items():
        found = load(name)
        origin = ", ".join(f"{key} {value}" for key, value in found["provenance"].items() if key != "command")
        parts.append(
            f"{_TITLES[name]}\n\n{table(found['rows'])}\n\n`benchmarks/results/{name}.json`: {origin}\n"
        )
    return "\n".join(parts)


def write() -> Path:
    """Write docs/benchmarks.md."""
    PAGE.write_text(text())
    return PAGE
