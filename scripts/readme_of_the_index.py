"""Gives the package's metadata the README without what only a checkout has: pictures and links to its files.

hatchling runs this when it builds; a package index shows no file of the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_PICTURE = re.compile(r'<img src="(?!https?:)[^>]*>\n\n')
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:)[^)]*\)")


def for_the_index(text: str) -> str:
    """Return README's text, with the words of a link to a file in its place, and without pictures."""
    return _LINK.sub(r"\1", _PICTURE.sub("", text))


class ReadmeOfTheIndex(MetadataHookInterface):
    """Sets `readme`, which pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the readme in the metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_the_index(text)}
