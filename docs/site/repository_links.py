"""Shows links that leave docs/ as the name of a file: they work in the repository only."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

_LINK = re.compile(r"\[([^\]]*)\]\((?:\.\./)+(?:[\w.-]+/)*[\w.-]*\)")


def _process(app: Sphinx, name: str, source: list[str]) -> None:
    del app
    if "/" not in name:  # pages at the top: `../` leaves docs/
        source[0] = _LINK.sub(r"`\1`", source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Run on the text of every page."""
    app.connect("source-read", _process)
    return {"parallel_read_safe": True}
