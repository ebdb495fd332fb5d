"""Runs the command line: `batchnorm study`, the verbs on a model, and `batchnorm --version`."""

from __future__ import annotations

from .interrupt import stop_at_once


def main() -> None:
    """Entry point of the `batchnorm` command."""
    stop_at_once()  # before the slow imports
    from .commands import app

    app()
