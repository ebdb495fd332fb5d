"""The report of claims: one HTML file that needs nothing else, in the style of the study's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import batchnorm
from batchnorm.studies.html_page import render_template, write_html
from batchnorm.studies.plots import Picture
from batchnorm.studies.verdicts import formatting as q

from .claim import Findings
from .pictures import illustrate, intervals
from .rules import RULE, Verdict
from .summary import Outcome, Records, band_in_words, judge_claim, measured_in_words, shown

_BADGES = {
    Verdict.REPRODUCED: ("yes", "✓"),
    Verdict.IN_SHAPE: ("partly", "◐"),
    Verdict.UNDECIDED: ("unclear", "≈"),
    Verdict.NOT_REPRODUCED: ("no", "✗"),
}


@dataclass(frozen=True)
class Article:
    """A claim on the page.

    Attributes:
        outcome: the claim and its judged parts.
        rows: a row per part: measure, published, what counts, measured, smallest effect that is found,
        verdict.
        pictures: of its experiment.
    """

    outcome: Outcome
    rows: tuple[tuple[str, str, str, str, str, Verdict], ...]
    pictures: tuple[Picture, ...]


def write_report(folder: Path, records: Records, missing: int = 0) -> Path:
    """Writes `report.html` into a folder, in full or not at all; `missing` experiments are still to come.

    Raises:
        FileError: it cannot be written.
    """
    path = folder / "report.html"
    write_html(path, render(records, missing))
    return path


def render(records: Records, missing: int = 0) -> str:
    """Returns the report as HTML; every name and value in it is escaped."""
    articles = []
    for claim, found in records.items():
        outcome = judge_claim(claim, found)
        findings = [Findings(record.numbers, record.curves, record.grids) for record in found]
        pictures = (intervals(f"{claim.name}-intervals", outcome.parts), *illustrate(claim, findings))
        articles.append(Article(outcome, _rows(outcome), pictures))
    counts = {verdict: sum(one.outcome.verdict is verdict for one in articles) for verdict in Verdict}
    return render_template(
        "claims.html.j2",
        articles=articles,
        badges=_BADGES,
        counts=q.listed([f"{number} {verdict.value}" for verdict, number in counts.items() if number]),
        measured=[measured_in_words(one.outcome.deciding) for one in articles],
        seeds=max(len(found) for found in records.values()),
        rule=RULE,
        missing=missing,
        version=batchnorm.__version__,
    )


def _rows(outcome: Outcome) -> tuple[tuple[str, str, str, str, str, Verdict], ...]:
    rows = []
    for judged in outcome.parts:
        part, smallest = judged.part, judged.part.smallest(len(judged.values))
        rows.append(
            (
                part.measure,
                part.published,
                band_in_words(part),
                measured_in_words(judged),
                shown(part, smallest),
                judged.verdict,
            )
        )
    return tuple(rows)
