"""The tables of a device's layers and training steps, and which result files there are."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks import goals, layer_page, results_file
from benchmarks.tables import Row, Rows, table_of

from .floor import passes

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
    """Goals and layers, for the terminal."""
    return f"{layer_goals(rows)}\n\n{layers_section(rows)}"


def layer_goals(rows: Rows) -> str:
    """Each goal of single layers, and what was found."""
    return goals.findings_table(goals.device_layer_findings(rows))


def layers_section(rows: Rows) -> str:
    """The layers, the speed of a copy, and the cases without figures."""
    return _joined(layers_table(rows), _copies(rows), _gaps(rows))


def layers_table(rows: Rows) -> str:
    """One row per case; a column for each rival that any case has."""
    measured = [row for row in rows if "missing" not in row]
    rivals = list(dict.fromkeys(name for row in measured for name in row["ratios"]))
    return table_of(_layer(row, rivals) for row in measured)


def _layer(row: Row, rivals: list[str]) -> dict[str, str]:
    found = row["rivals"]
    ours = found.get("ours")
    host = {name: f"{own['host_seconds'] * 1e6:.0f}" for name, own in found.items()}
    return {
        "": layer_page.operation(row),
        "shape": str(tuple(row["shape"])),
        "layout": row["layout"],
        "floor": f"{passes(row['regime'], 'add' in row['operation'])} ({row['regime']})",
        "ours, ms": f"{ours['seconds'] * 1e3:.3g}" if ours else "failed",
        "GB/s": f"{ours['gigabytes_per_second']:.4g}" if ours else "",
        "÷ floor": f"{ours['over_floor']:.2f}" if ours else "",
        **{layer_page.rival(name): layer_page.ratio_of(row, name) for name in rivals},
        "host, µs: ours": host.get("ours", ""),
        "stock": host.get("stock", ""),
        "stock runs": row["stock_runs"].get("stock", ""),
    }


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
    """Goals and training steps, for the terminal."""
    return f"{step_goals(rows)}\n\n{steps_section(rows)}"


def step_goals(rows: Rows) -> str:
    """Each goal of training steps, and what was found."""
    return goals.findings_table(goals.device_step_findings(rows))


def steps_section(rows: Rows) -> str:
    """The training steps, and the cases without figures."""
    return _joined(steps_table(rows), _gaps(rows))


def steps_table(rows: Rows) -> str:
    """One row per variant of each network."""
    return table_of(
        {
            "network": row["network"],
            "batch": f"{row['batch']} × 3 × {row['side']}²",
            "variant": name,
            "images/s": f"{found['images_per_second']:.4g}",
            "time, stock ÷ it": layer_page.ratio_of(row, f"stock / {name}"),
            **{
                f"{key}, GB (÷ stock)": _gigabytes(key, found, row["variants"].get("stock", found))
                for key in ("held", "peak")
            },
        }
        for row in rows
        if "missing" not in row
        for name, found in row["variants"].items()
    )


def _gigabytes(key: str, variant: Row, stock: Row) -> str:
    found, whole = variant["bytes"], stock["bytes"]
    if found is None or whole is None:  # on a CPU
        return ""
    return f"{found[key] / _GIGA:.2f} ({found[key] / whole[key]:.2f})"


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


def _name(row: Row) -> str:
    if "operation" not in row:
        return f"{row['network']} ({', '.join(row['asked'])})"
    return f"{layer_page.operation(row)}, {tuple(row['shape'])}, {row['layout']}"


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
