"""Pictures of the documents, the same bytes for the same rows."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, without a date and with fixed identifiers."""
    with mpl.rc_context({"svg.hashsalt": "batchnorm", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
