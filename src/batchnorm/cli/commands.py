"""What the `batchnorm` command can be asked: its commands and options, for Typer."""

from __future__ import annotations

from typing import Annotated

import typer

import batchnorm

from . import models
from .study import study

app = typer.Typer(
    help="Batch normalization for PyTorch and Keras.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(study)
for command in models.COMMANDS:
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"batchnorm {batchnorm.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
