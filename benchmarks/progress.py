"""Shows the progress of a measurement on stderr; stdout is for the tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    """Yield `items`, and show how many are done: a bar by rich, or a line each where rich is missing."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return _lines(items, what)
    return track(items, description=what, console=Console(stderr=True))


def _lines(items: Sequence[Item], what: str) -> Iterable[Item]:
    for number, item in enumerate(items, 1):
        print(f"{what}: {number} of {len(items)}", file=sys.stderr)
        yield item
