"""Tables of the norms that `fold` absorbs, and of the time of inference."""

from __future__ import annotations

from .fold_inference import FX, ONNX, ONNX_OURS, OURS, STOCK
from .fold_zoo import WRONG
from .goals import Finding, findings_table
from .tables import Row, Rows, table_of
from .zoo import OF_IMAGES

_WRONG_FLOAT32 = 1e-4  # for fx, and for networks that do not run in float64: rounding is 1e-6


def zoo_findings(rows: Rows) -> list[Finding]:
    """Return the goals of `fold` over the zoo."""
    run, allowed = ("absorbed", "running"), ("allowed_absorbed", "allowed")
    images = [row for row in rows if row["network"] in OF_IMAGES]
    shares = (
        ("norms that run, all networks: the share absorbed", 0.85, run, rows),
        ("norms that run, networks of images: the share absorbed", 0.91, run, images),
        ("norms that exact arithmetic allows to fold: the share absorbed", 0.95, allowed, rows),
    )
    found = []
    for what, goal, (part, whole), among in shares:
        counted = [row for row in among if row[whole]]
        share = sum(row[part] for row in counted) / sum(row[whole] for row in counted)
        worst = min(row[part] / row[whole] for row in counted)
        found.append(Finding(what, f"≥ {goal:g}", share, worst, len(counted), share >= goal))
    wrong = sum(map(is_wrong, rows))
    found.append(Finding("networks whose outputs are wrong", "0", wrong, wrong, len(rows), wrong == 0))
    share = sum(row["fx"]["absorbed"] for row in rows) / sum(row["running"] for row in rows)
    wrong = sum(row["fx"].get("off", 0.0) > _WRONG_FLOAT32 for row in rows)
    found.append(Finding("fx's fuse: the share absorbed", "–", share, 0.0, len(rows), True))
    found.append(Finding("fx's fuse: networks whose outputs are wrong", "–", wrong, wrong, len(rows), True))
    return found


def is_wrong(row: Row) -> bool:
    """Return whether the outputs of a folded copy differ from the network's."""
    if row["off_float64"] is None:
        return not row["off_float32"] <= _WRONG_FLOAT32
    return not row["off_float64"] <= WRONG


def zoo_goals_table(rows: Rows) -> str:
    """Each goal, and what was found."""
    return findings_table(zoo_findings(rows))


def zoo_table(rows: Rows) -> str:
    """Every network: norms that run, are absorbed and could be; errors; fx's outcome; why norms stay."""
    return table_of(
        {
            "network": row["network"],
            "run": str(row["running"]),
            "absorbed": str(row["absorbed"]),
            "possible": str(row["allowed"]),
            "off, float64": "–" if row["off_float64"] is None else f"{row['off_float64']:.0e}",
            "off, float32": f"{row['off_float32']:.0e}",
            "fx absorbs": _fx(row["fx"]),
            "left because": _reasons(row["stay"]),
        }
        for row in rows
    )


def _fx(found: Row) -> str:
    if "error" in found:
        return f"– ({found['error'].partition(':')[0]})"
    wrong = found["off"] > _WRONG_FLOAT32
    return f"{found['absorbed']}, **wrong by {found['off']:.0%}**" if wrong else str(found["absorbed"])


def _reasons(stay: dict[str, int]) -> str:
    """Return the most frequent reason, and how many norms stay for others."""
    if not stay:
        return ""
    first, *others = sorted(stay, key=lambda reason: -stay[reason])
    rest = sum(stay[reason] for reason in others)
    return f"{stay[first]}: {first}" + (f"; {rest} for others like it" if rest else "")


def inference_table(rows: Rows) -> str:
    """Milliseconds of a forward, and how many times faster than stock each rival is."""

    def shown(row: Row, rival: str) -> str:
        if rival not in row["seconds"]:
            return "–"
        return f"{row['seconds'][rival] * 1e3:.1f} ({row['ratios'][rival]['median']:.2f}×)"

    return table_of(
        {
            "network": row["network"],
            "images": f"{row['batch']} × {row['side']}²",
            "layout": row["layout"],
            "stock, ms": f"{row['seconds'][STOCK] * 1e3:.1f}",
        }
        | {rival: shown(row, rival) for rival in (OURS, FX, ONNX, ONNX_OURS)}
        for row in rows
    )
