"""Reads our docstrings, which are plain text, as reStructuredText: formulas keep their lines, |x| its bars.

An indented block outside of the sections is a formula; Sphinx would join its lines to a paragraph.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # tests run this without Sphinx
    from sphinx.application import Sphinx

SECTIONS = ("Args", "Attributes", "Call arguments", "Example", "Raises", "Returns", "Warns", "Yields")
_SECTION = re.compile(f"({'|'.join(SECTIONS)}):$")
# "Source: Ioffe 2015" and "Differs from torch: ...".
_REMARK = re.compile(r"(Source|Differs from .*?): ")


def as_restructured_text(lines: list[str]) -> list[str]:
    """Return the lines of a docstring with `::` before formulas, and remarks and bars marked up."""
    found: list[str] = []
    in_section = in_formula = False
    for line in lines:
        is_indented = line.startswith("    ")
        if line and not is_indented:
            in_section, in_formula = bool(_SECTION.match(line)), False
            line = _REMARK.sub(r"**\1**: ", line, count=1)
        elif is_indented and not in_section and not in_formula:
            found += ["::", ""]
            in_formula = True
        found.append(line if in_formula else line.replace("|", r"\|"))
    return found


def _process(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    del app, what, name, obj, options
    lines[:] = as_restructured_text(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Run before napoleon, which turns sections into fields."""
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True}
