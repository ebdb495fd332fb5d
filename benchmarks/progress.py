"""How far a measurement is, on stderr: stdout is for the tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    """Yield `items`, and show how many are done."""
    return track(items, description=what, console=Console(stderr=True))
