"""The tables of the layers' and the training steps' times."""

from __future__ import annotations

from . import goals
from .layer_cases import OPERATIONS
from .reusing_process import REUSING
from .tables import Row, Rows, table_of, with_quartiles

# Whole training steps -> how many times faster they should be, as the norms' share of stock's step allows.
_STEP_GOALS = {"MobileNetV2": 1.25, "DenseNet-121": 1.15, "ResNet-50": 1.10}


def goals_table(rows: Rows) -> str:
    """Each goal, what was found, and the worst single row."""
    return goals.findings_table(goals.layer_findings(rows))


def row_goals_table(rows: Rows) -> str:
    """The goals of every row, and of means."""
    return goals.findings_table(goals.layer_row_findings(rows))


def step_goals_table(rows: Rows) -> str:
    """The goals of whole training steps of large networks."""
    return goals.findings_table(goals.step_findings(rows))


def reuse_goals_table(rows: Rows) -> str:
    """The same with `reuse_memory()`."""
    return goals.findings_table(goals.reuse_memory_findings(rows))


def main_table(rows: Rows) -> str:
    """Norm → ReLU in float32, with every rival."""
    return layer_table([row for row in rows if _key(row) == ("norm-relu", "float32")])


def other_table(rows: Rows) -> str:
    """Other operations and dtypes."""
    return layer_table([row for row in rows if _key(row) != ("norm-relu", "float32")])


def _key(row: Row) -> tuple[str, str]:
    return row["operation"], row["dtype"]


def losses_table(rows: Rows) -> str:
    """Cases in which ours is slower than stock by the median, the worst first."""
    ratios = ((row["ratios"]["stock / ours"], row) for row in rows)
    slower = sorted(((ratio, row) for ratio, row in ratios if ratio["median"] < 1), key=_by_median)
    return table_of(
        {
            "": operation(row),
            "shape": str(tuple(row["shape"])),
            "layout": row["layout"],
            "stock, ms": f"{row['rivals']['stock']['seconds'] * 1e3:.3g}",
            "ours, ms": f"{row['rivals']['ours']['seconds'] * 1e3:.3g}",
            "stock ÷ ours": with_quartiles(ratio),
        }
        for ratio, row in slower
    )


def _by_median(pair: tuple[Row, Row]) -> float:
    return float(pair[0]["median"])


def layer_table(rows: Rows) -> str:
    """One row per case; a column for each rival that any case has."""
    rivals = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    return table_of(_case(row) | {rival(name): ratio_of(row, name) for name in rivals} for row in rows)


def _case(row: Row) -> dict[str, str]:
    ours = row["rivals"].get("ours" + REUSING) or row["rivals"]["ours"]
    return {
        "": operation(row),
        "shape": str(tuple(row["shape"])),
        "layout": row["layout"],
        "ours, ms": f"{ours['seconds'] * 1e3:.3g}",
        "GB/s": f"{ours['gigabytes_per_second']:.3g}",
        "÷ floor": f"{ours['over_floor']:.2f}",
    }


def operation(row: Row) -> str:
    """Return what a row measures, and where it is found."""
    kind = OPERATIONS[row["operation"]] + ("" if row["dtype"] == "float32" else f", {row['dtype']}")
    return f"{kind} ({row['network']})"


def rival(name: str) -> str:
    """Return how a ratio is headed."""
    return name.replace(" / ", " ÷ ").replace(REUSING, " (reusing)")


def ratio_of(row: Row, name: str) -> str:
    """Return a ratio's median with its quartiles, or nothing."""
    found = row["ratios"].get(name)
    return "" if found is None else with_quartiles(found)


def step_table(rows: Rows) -> str:
    """Whole training steps."""
    return table_of(
        {
            "network": row["network"],
            "batch": f"{row['batch']} × 3 × {row['side']}²",
            "layout": row["layout"],
            "stock, ms": f"{row['seconds']['stock'] * 1e3:.0f}",
            "ours, ms": f"{row['seconds']['ours'] * 1e3:.0f}",
            "goal": f"≥ {_STEP_GOALS[row['network']]}" if row["network"] in _STEP_GOALS else "–",
        }
        | {rival(name): with_quartiles(found) for name, found in row["ratios"].items()}
        for row in rows
    )
