"""Writes a diagnosis as a page of HTML, in the style of the study's report."""

from __future__ import annotations

from pathlib import Path

from batchnorm.doctor.findings import CHECKS, Diagnosis, listed, printable
from batchnorm.version import __version__

from .html_page import render_template, write_html
from .plots import diagnosis as plot

_BADGES = {"serious": ("no", "✕"), "likely": ("partly", "!"), "note": ("", "i")}


def write_page(diagnosis: Diagnosis, path: Path) -> None:
    """Writes the page, in full or not at all.

    Raises:
        FileError: it cannot be written.
    """
    write_html(path, render(diagnosis))


def render(diagnosis: Diagnosis) -> str:
    """Returns the diagnosis as a page of HTML; every name and value in it is escaped."""
    return render_template(
        "doctor.html.j2",
        code=printable,
        diagnosis=diagnosis,
        groups=[
            (first, CHECKS[first.check], listed([of.layer for of in (first, *others) if of.layer], 12))
            for first, others in diagnosis.groups()
        ],
        badges=_BADGES,
        pictures=[plot.picture("layers", diagnosis)] if diagnosis.layers else [],
        version=__version__,
    )
