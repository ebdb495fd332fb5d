"""The tables of a device's layers and training steps, and which result files there are."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks import goals, layer_page, results_file
from benchmarks.tables import table

from .floor import passes

Rows = list[dict[str, Any]]
_LARGE = 64_000_000  # bytes from which a copy is memory's
_GIGA = 1e9
_NONE = """\
**There is no figure of a GPU yet, and none is claimed anywhere.** The kernels for GPUs have been run in
Triton's interpreter only, on a CPU: that shows what they compute, and nothing of their speed."""
_NAMED = 6  # cases without figures for the same reason, that are named and not counted


def files(section: str, folder: Path = results_file.FOLDER) -> list[str]:
    """Return the names of the result files of a section on GPUs; a CPU is only there to try it."""
    names = sorted(path.stem for path in folder.glob(f"{section}-*.json"))
    return [name for name in names if name != f"{section}-cpu"]


def state(folder: Path = results_file.FOLDER) -> str:
    """Say whether there is any figure of a GPU."""
    found = [name for section in ("layers", "steps") for name in files(section, folder)]
    if found:
        return f"Measured: {', '.join(f'`{name}`' for name in found)}."
    return _NONE


def layers_text(rows: Rows) -> str:
    """Goals and layers: all that is printed."""
    return f"{layer_goals(rows)}\n\n{layers_section(rows)}"


def layer_goals(rows: Rows) -> str:
    """Each goal of single layers, and what was found."""
    return goals.findings_table(goals.device_layer_findings(rows))


def layers_section(rows: Rows) -> str:
    """The layers, what a copy moved, and what there is no figure of."""
    return _joined(layers_table(rows), _copies(rows), _gaps(rows))


def layers_table(rows: Rows) -> str:
    """One row per case; a column for each rival that any case has."""
    measured = [row for row in rows if "missing" not in row]
    rivals = list(dict.fromkeys(name for row in measured for name in row["ratios"]))
    header = (
        *("", "shape", "layout", "floor", "ours, ms", "GB/s", "÷ floor"),
        *(layer_page.rival(name) for name in rivals),
        *("host, µs: ours", "stock", "stock runs"),
    )
    return table(header, [_layer(row, rivals) for row in measured]) if measured else ""


def _layer(row: dict[str, Any], rivals: list[str]) -> tuple[str, ...]:
    ours, found = row["rivals"].get("ours"), row["rivals"]
    figures = (
        (
            f"{ours['seconds'] * 1e3:.3g}",
            f"{ours['gigabytes_per_second']:.4g}",
            f"{ours['over_floor']:.2f}",
        )
        if ours
        else ("failed", "", "")
    )
    return (
        layer_page.operation(row),
        str(tuple(row["shape"])),
        row["layout"],
        f"{passes(row['regime'], 'add' in row['operation'])} ({row['regime']})",
        *figures,
        *(layer_page.ratio_of(row, name) for name in rivals),
        *(f"{found[name]['host_seconds'] * 1e6:.0f}" if name in found else "" for name in ("ours", "stock")),
        row["stock_runs"].get("stock", ""),
    )


def _copies(rows: Rows) -> str:
    """Say what a copy moved, and on which engines ours ran."""
    measured = [row for row in rows if "missing" not in row]
    if not measured:
        return ""
    large = [row for row in measured if row["tensor_bytes"] > _LARGE] or measured
    speeds = [2 * row["tensor_bytes"] / row["copy_seconds"]["copy"] / _GIGA for row in large]
    engines = ", ".join(dict.fromkeys(row["engine"] for row in measured))
    return (
        f"A copy moved {statistics.median(speeds):.4g} GB/s (median of {len(speeds)} tensors, read and "
        f"written). Ours ran on the engine `{engines}`."
    )


def steps_text(rows: Rows) -> str:
    """Goals and training steps: all that is printed."""
    return f"{step_goals(rows)}\n\n{steps_section(rows)}"


def step_goals(rows: Rows) -> str:
    """Each goal of training steps, and what was found."""
    return goals.findings_table(goals.device_step_findings(rows))


def steps_section(rows: Rows) -> str:
    """The training steps, and what there is no figure of."""
    return _joined(steps_table(rows), _gaps(rows))


def steps_table(rows: Rows) -> str:
    """One row per variant of each network."""
    measured = [row for row in rows if "missing" not in row]
    header = (
        "network",
        "batch",
        "variant",
        "images/s",
        "time, stock ÷ it",
        "held, GB (÷ stock)",
        "peak, GB (÷ stock)",
    )
    if not measured:
        return ""
    return table(
        header,
        [
            (
                row["network"],
                f"{row['batch']} × 3 × {row['side']}²",
                name,
                f"{found['images_per_second']:.4g}",
                layer_page.ratio_of(row, f"stock / {name}"),
                *_gigabytes(found["bytes"], row["variants"].get("stock", found)["bytes"]),
            )
            for row in measured
            for name, found in row["variants"].items()
        ],
    )


def _gigabytes(found: dict[str, int] | None, stock: dict[str, int] | None) -> tuple[str, ...]:
    if found is None or stock is None:  # on a CPU
        return "", ""
    return tuple(f"{found[key] / _GIGA:.2f} ({found[key] / stock[key]:.2f})" for key in ("held", "peak"))


def _gaps(rows: Rows) -> str:
    """Say which cases have no figures, and which rivals failed, and why."""
    missing: dict[str, list[str]] = {}
    for row in rows:
        if "missing" in row:
            missing.setdefault(row["missing"], []).append(_name(row))
    lines = [
        f"- {why}: " + (f"{len(names)} of {len(rows)} cases" if len(names) > _NAMED else "; ".join(names))
        for why, names in missing.items()
    ]
    lines += [
        f"- {_name(row)}: {rival}: {why}" for row in rows for rival, why in row.get("failed", {}).items()
    ]
    return "\n".join(["Without figures:", "", *lines]) if lines else ""


def _name(row: dict[str, Any]) -> str:
    if "operation" not in row:
        return f"{row['network']} ({', '.join(row['asked'])})"
    return f"{layer_page.operation(row)}, {tuple(row['shape'])}, {row['layout']}"


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
