"""Verdicts on claims of the literature: a row per claim, with its parts.

`python -m benchmarks.claims` measures nothing: it writes the claims that `batchnorm claims` has finished.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from batchnorm.claims import CLAIMS, ClaimsOptions, run_claims
from batchnorm.claims.rules import RULE, Part
from batchnorm.claims.runner import finished
from batchnorm.claims.summary import band_in_words, shown
from batchnorm.studies.verdicts import formatting as q

from . import page, results_file
from .tables import Row, Rows, table, table_of


def measure(quick: bool = False) -> Rows:
    """Test every claim with five seeds, going on from what is in runs/claims; return a row per claim."""
    if not quick:
        return list(run_claims(ClaimsOptions()).results["claims"])
    with tempfile.TemporaryDirectory() as folder:
        options = ClaimsOptions(("dropout-before-norm",), seeds=1, out=Path(folder))
        return list(run_claims(options).results["claims"])


def write_finished() -> Path:
    """Write the result file of the claims whose five seeds are in runs/claims, and their page."""
    names = finished(ClaimsOptions())
    if not names:
        raise SystemExit("no claim is finished in runs/claims: batchnorm claims measures them")
    rows = list(run_claims(ClaimsOptions(names)).results["claims"])
    path = results_file.save("claims-cpu", "batchnorm claims; python -m benchmarks.claims", rows)
    page.write([page.ROOT / "docs" / "claims.md"])
    return path


def verdicts_table(rows: Rows) -> str:
    """Every claim with the part that decides."""
    return table_of(
        {
            "claim": f"[{row['number']}. {row['name']}](#{row['number']}-{row['name']})",
            "the part that decides (95 % interval)": f"{_cell(row['measure'])}: {row['measured']}",
            "published": _cell(_deciding(row)["published"]),
            "verdict": row["verdict"],
        }
        for row in rows
    )


def _deciding(row: Row) -> Row:
    return next(part for part in row["parts"] if part["verdict"] == row["verdict"])


def claims_section(rows: Rows) -> str:
    """A section per claim: what was claimed and done, and a table of its parts."""
    return "\n\n".join(map(_section, rows))


def _section(row: Row) -> str:
    parts = []
    for measured in row["parts"]:
        part = _part(measured)
        parts.append(
            (
                _cell(measured["measure"]),
                _cell(measured["published"]),
                band_in_words(part),
                _interval(part, measured),
                shown(part, _number(measured["smallest effect"])),
                measured["verdict"],
            )
        )
    header = (
        "part",
        "published",
        "counts as reproduced",
        "measured (95 % interval)",
        "smallest effect found",
        "verdict",
    )
    why = f"\n\nWhy: {row['known']}" if row["known"] else ""
    return (
        f"### {row['number']}. {row['name']}\n\n**{row['claim']}** {row['verdict'].capitalize()}.\n\n"
        f"{row['source']} ({row['read']}): {row['published']}.\n\n"
        f"Experiment: {row['setting']}; {row['seeds']} seeds, {row['seconds']:.0f} s each.\n\n"
        f"{table(header, parts)}{why}"
    )


def _part(measured: Row) -> Part:
    """Return the part as it was judged, to show its numbers in its unit."""
    low, high = measured["band"]
    band = (-math.inf if low is None else low, math.inf if high is None else high)
    return Part(
        measured["measure"], measured["measure"], measured["published"], band, measured["no effect"], 0.0,
        measured["unit"],
    )  # fmt: skip


def _interval(part: Part, measured: Row) -> str:
    low, mean, high = (
        _number(value) for value in (measured["interval"][0], measured["mean"], measured["interval"][1])
    )
    if math.isnan(low):
        return shown(part, mean)
    return f"{shown(part, mean)} ({q.span(shown(part, low), shown(part, high), ' to ')})"


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def rule(rows: Rows) -> str:
    """The rule of the verdicts, and how many claims have which."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    told = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    done = {row["name"] for row in rows}
    left = ", ".join(claim.name for claim in CLAIMS if claim.name not in done)
    rest = f" Not run yet: {left}." if left else ""
    return f"{RULE}\n\nOf {len(rows)} claims: {told}.{rest}"


if __name__ == "__main__":
    print(write_finished())
