"""Writes a diagnosis as a page of HTML, in the style of the study's report."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import batchnorm
from batchnorm.doctor.findings import CHECKS, Diagnosis, listed, printable
from batchnorm.errors import in_one_line
from batchnorm.files import write_whole

from .plots import diagnosis as plot

_BADGES = {"serious": ("no", "✕"), "likely": ("partly", "!"), "note": ("", "i")}


def write_page(diagnosis: Diagnosis, path: Path) -> None:
    """Writes the page, in full or not at all.

    Raises:
        FileError: it cannot be written.
    """
    # A name may hold half a surrogate pair, which no file in UTF-8 can.
    write_whole(path, render(diagnosis).encode("utf-8", "replace").decode("utf-8"))


def render(diagnosis: Diagnosis) -> str:
    """Returns the diagnosis as a page of HTML; every name and value in it is escaped."""
    environment = Environment(
        loader=PackageLoader("batchnorm.study", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = lambda picture: Markup(picture.svg)  # escaped where it is drawn
    environment.filters["line"] = in_one_line
    environment.filters["code"] = printable
    return environment.get_template("doctor.html.j2").render(
        diagnosis=diagnosis,
        groups=[
            (first, CHECKS[first.check], listed([of.layer for of in (first, *others) if of.layer], 12))
            for first, others in diagnosis.groups()
        ],
        badges=_BADGES,
        pictures=[plot.picture("layers", diagnosis)] if diagnosis.layers else [],
        version=batchnorm.__version__,
    )
