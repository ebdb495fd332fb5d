"""Tables and pictures of the norms that `fold` absorbs, and of the time of inference."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from batchnorm.studies.plots import canvas

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
    share = share_absorbed(rows, by_fx=True)
    wrong = sum(map(_is_wrong_by_fx, rows))
    found.append(Finding("fx's fuse: the share absorbed", "–", share, 0.0, len(rows), True))
    found.append(Finding("fx's fuse: networks whose outputs are wrong", "–", wrong, wrong, len(rows), True))
    return found


def share_absorbed(rows: Rows, *, by_fx: bool = False) -> float:
    """Return the share 0..1 of the norms that run which `fold`, or torch.fx, absorbs."""
    absorbed = sum((row["fx"] if by_fx else row)["absorbed"] for row in rows)
    return float(absorbed / sum(row["running"] for row in rows))


def _is_wrong_by_fx(row: Row) -> bool:
    return bool(row["fx"].get("off", 0.0) > _WRONG_FLOAT32)


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
    if found["off"] > _WRONG_FLOAT32:
        return f"{found['absorbed']}, **wrong by {found['off']:.0%}**"
    return str(found["absorbed"])


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


# What becomes of a network's norms -> its colour, and how dense.
_OUTCOMES = {
    "all that can be folded are": (canvas.SUBJECT_COLOR, 1.0),
    "some are": (canvas.SUBJECT_COLOR, 0.45),
    "the network cannot be traced": (canvas.SOFT, 0.5),
    "the outputs are wrong": (canvas.BASELINE_COLOR, 1.0),
}


def zoo_picture(rows: Rows) -> canvas.Picture:
    """Draw how many networks have which outcome, by `fold` and by torch.fx."""
    tools = {"fold": _outcomes(rows), "torch.fx": _outcomes(rows, by_fx=True)}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, counts in enumerate(tools.values()):
            left = 0
            for outcome, number in counts.items():
                color, alpha = _OUTCOMES[outcome]
                axes.barh(place, number, 0.5, left, color=color, alpha=alpha)
                if number:
                    axes.text(left + number / 2, place - 0.32, str(number), ha="center", color=canvas.INK)
                left += number
        axes.set_yticks(range(len(tools)), list(tools), color=canvas.INK)
        axes.set_ylim(len(tools) - 0.6, -0.75)
        axes.set_xlim(0, len(rows))
        axes.yaxis.grid(False)
        axes.set_xlabel("networks", loc="right")
        patches = [Patch(color=color, alpha=alpha, label=name) for name, (color, alpha) in _OUTCOMES.items()]
        figure.legend(handles=patches, loc="outside upper left", ncols=2, frameon=False, handlelength=1.0)

    told = "; ".join(
        f"{tool}: " + ", ".join(f"{outcome} {number}" for outcome, number in counts.items())
        for tool, counts in tools.items()
    )
    title = f"What becomes of the norms of {len(rows)} networks"
    return canvas.draw("fold-zoo", title, f"{title}: {told}.", 1.9, paint, width=6.3)


def _outcomes(rows: Rows, *, by_fx: bool = False) -> dict[str, int]:
    """Return how many networks have each outcome."""
    whole, some, untraced, wrong = _OUTCOMES
    counts = dict.fromkeys(_OUTCOMES, 0)
    for row in rows:
        found = row["fx"] if by_fx else row
        if _is_wrong_by_fx(row) if by_fx else is_wrong(row):
            counts[wrong] += 1
        elif "error" in found:
            counts[untraced] += 1
        else:
            counts[whole if found["absorbed"] >= max(row["allowed"], row["absorbed"]) else some] += 1
    return counts


_RIVALS = {  # -> colour and fill of its dot
    OURS: (canvas.SUBJECT_COLOR, "full"),
    FX: (canvas.BASELINE_COLOR, "full"),
    ONNX: (canvas.OTHER_COLOR, "none"),
    ONNX_OURS: (canvas.OTHER_COLOR, "full"),
}


def inference_picture(rows: Rows) -> canvas.Picture:
    """Draw a row per network, batch and layout: how many times faster than stock each rival is."""
    names = [f"{row['network']}, {row['batch']} × {row['side']}², {row['layout']}" for row in rows]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        lines = []
        for rival, (color, fill) in _RIVALS.items():
            found = [
                (row["ratios"][rival]["median"], i) for i, row in enumerate(rows) if rival in row["ratios"]
            ]
            look = {"color": color, "fillstyle": fill, "markersize": 5, "label": rival}
            lines += axes.plot(*zip(*found, strict=True), "o", **look)
        axes.axvline(1, color=canvas.SOFT, linewidth=1)
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.set_xlim(left=0.8)
        axes.set_xlabel("stock's time ÷ this one's", loc="right")
        canvas.legend(figure, lines, 4, 1.0)

    told = "; ".join(
        f"{name}: " + ", ".join(f"{rival} {ratio['median']:.2f}" for rival, ratio in row["ratios"].items())
        for name, row in zip(names, rows, strict=True)
    )
    title = "A forward in evaluation: stock's time ÷ that of a copy without norms"
    return canvas.draw("fold-inference", title, f"{told}.", 0.9 + 0.24 * len(rows), paint, width=6.3)
