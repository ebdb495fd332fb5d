"""Shows a diagnosis in a notebook: a fragment of HTML that brings its own style and escapes every text."""

from __future__ import annotations

from html import escape

from batchnorm.errors import in_one_line

from .findings import Diagnosis, Finding, listed, printable

_COLORS = {"serious": "#a33f00", "likely": "#5b5200", "note": "#57606a"}
_MONO = "font-family: ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap"


def fragment(diagnosis: Diagnosis) -> str:
    """Return the diagnosis as HTML."""
    parts = [f"<p><strong>{_safe(diagnosis.title)}</strong></p>"]
    if diagnosis.scores:
        parts.append(f"<p>{_safe(diagnosis.scores_in_words())}</p>")
    if diagnosis.findings:
        rows = "".join(_row(first, others) for first, others in diagnosis.groups())
        parts.append(f'<table style="text-align: left"><tbody>{rows}</tbody></table>')
    parts += [f"<p>not looked at: {_safe(why)}</p>" for why in diagnosis.unchecked]
    return f"<div>{''.join(parts)}</div>"


def _row(first: Finding, others: list[Finding]) -> str:
    layers = listed([found.layer for found in (first, *others) if found.layer])
    left, style = (
        "text-align: left; vertical-align: top",
        f"color: {_COLORS[first.severity]}; font-weight: 600",
    )
    return (
        f'<tr><td style="{left}"><span style="{style}">{first.severity}</span><br>{_safe(first.check)}</td>'
        f'<td style="{left}">{_safe(layers)}</td><td style="{left}">{_safe(first.message)} {_safe(first.why)}'
        f'<pre style="{_MONO}; margin: .3em 0">{escape(printable(first.remedy))}</pre></td></tr>'
    )


def _safe(text: str) -> str:
    return escape(in_one_line(text))
