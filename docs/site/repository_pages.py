"""Reads pages that are written for the repository: links out of docs/, and anchors within tables."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # tests run this without Sphinx
    from sphinx.application import Sphinx

_LINK = re.compile(r"\[([^\]]*)\]\((?:\.\./)+(?:[\w.-]+/)*[\w.-]*\)")
_ANCHOR = re.compile(r'<a id="([\w-]+)"></a>(`[^`]*`)')


def for_the_site(text: str) -> str:
    """Return the text of a page at the top of docs/ as MyST reads it.

    A link that leaves docs/ becomes the name of a file, as the site is no part of the repository. An anchor
    becomes one that other pages can link to: MyST does not look into HTML.
    """
    return _ANCHOR.sub(r"[\2]{#\1}", _LINK.sub(r"`\1`", text))


def _process(app: Sphinx, name: str, source: list[str]) -> None:
    del app
    if "/" not in name:
        source[0] = for_the_site(source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Run on the text of every page."""
    app.connect("source-read", _process)
    return {"parallel_read_safe": True}
