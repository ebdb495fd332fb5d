"""The command line: `batchnorm study`, the verbs on a model, and `batchnorm --version`."""

from __future__ import annotations

from typing import Any

from .interrupt import stop_at_once


def main() -> None:
    """Entry point of the `batchnorm` command."""
    stop_at_once()  # before imports that take their time
    from .commands import app

    app()


def __getattr__(name: str) -> Any:
    if name == "app":
        from .commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
