"""Tables in Markdown, of the rows of result files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Rows = list[Row]


def table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return the table, a line per row."""
    names = tuple(header)
    lines = [names, tuple("---" for _ in names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_of(rows: Iterable[dict[str, str]]) -> str:
    """Return the table of rows that have their cells under the names of the columns; "" without rows."""
    found = list(rows)
    return table(found[0], [tuple(row.values()) for row in found]) if found else ""


def with_quartiles(ratio: Row) -> str:
    """Return a ratio's median with its quartiles, as `interleaved.ratio` has them."""
    return "{:.2f} ({:.2f} – {:.2f})".format(ratio["median"], *ratio["quartiles"])
