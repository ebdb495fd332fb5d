"""Runs the command line: `batchnorm study`, the verbs on a model, `batchnorm env`, and `--version`."""

from __future__ import annotations

import importlib.util
import sys

from .interrupt import stop_at_once


def main() -> None:
    """Entry point of the `batchnorm` command."""
    stop_at_once()  # before the slow imports
    if importlib.util.find_spec("typer") is None:
        from .environment import run_without_typer

        sys.exit(run_without_typer(sys.argv[1:]))
    from .commands import app

    app()
