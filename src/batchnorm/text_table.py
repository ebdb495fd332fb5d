"""Lays out rows of cells as plain text, and as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .errors import in_one_line


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one line per row: each column as wide as its widest cell, two spaces between columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def as_html(title: str, rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return a title, a table whose first row is its header, and notes, as HTML; all text is escaped.

    Notebooks show it where an object has `_repr_html_`.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        inner = "".join(f'<{tag} style="text-align: left">{escaped(cell)}</{tag}>' for cell in cells)
        return f"<tr>{inner}</tr>"

    parts = [f"<p><strong>{escaped(title)}</strong></p>"]
    if len(rows) > 1:
        body = "".join(line(row, "td") for row in rows[1:])
        parts.append(f"<table><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table>")
    parts += [f"<p>{escaped(note)}</p>" for note in notes]
    return f"<div>{''.join(parts)}</div>"


def escaped(text: str) -> str:
    """Return a text in one line, with what HTML would read as markup escaped."""
    return escape(in_one_line(text))
