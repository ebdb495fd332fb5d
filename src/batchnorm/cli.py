"""The command line: `batchnorm study` and `batchnorm --version`."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

import batchnorm

from .errors import BatchNormError, OptionError

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    help="Batch normalization for PyTorch and Keras.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the `batchnorm` command."""
    app()


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


@app.command()
def study(
    network: Annotated[
        str, typer.Option(help="Comma-separated: mlp, deep, cnn, or your own as file.py:function.")
    ] = "mlp,deep",
    data: Annotated[
        str,
        typer.Option(help="digits (comes with the package), mnist, or your own as file.py:function."),
    ] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with MNIST's IDX files or mnist.npz, or a cache of them.")
    ] = None,
    framework: Annotated[
        str, typer.Option(help="torch, or keras on the backend that KERAS_BACKEND or Keras's settings name.")
    ] = "torch",
    arms: Annotated[
        str,
        typer.Option(
            help="Comma-separated: none, batchnorm, layernorm, dropout, l1, l2, or several joined by +."
        ),
    ] = "none,batchnorm,dropout,l1,l2,layernorm,batchnorm+dropout",
    learning_rate: Annotated[
        str, typer.Option(help="Comma-separated learning rates of Adam.")
    ] = "1e-4,1e-3,1e-2",
    seeds: Annotated[int, typer.Option(help="Runs with different initial weights and orders.")] = 3,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Examples per training step.")] = 32,
    target_accuracy: Annotated[
        float, typer.Option(help="Held-out accuracy, 0 to 1, that 'steps to target' counts up to.")
    ] = 0.85,
    jobs: Annotated[str, typer.Option(help="Training runs at a time; auto is one per core.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of results; a second call goes on there.",
            show_default="runs/study-DATA-NETWORKS, study-keras-BACKEND-... with keras",
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """What does batch normalization buy this network on this data?

    Trains each network in each arm, at each learning rate, with each seed, and writes report.html,
    results.json and curves.csv. Ctrl-C keeps every finished run; the same command goes on from there.
    """
    with _one_clear_line(debug):
        from .study import StudyOptions, run_study
        from .study.options import parse_rates, split_list
        from .study.terminal import TerminalDisplay, print_results

        options = StudyOptions(
            networks=split_list(network),
            data=data,
            data_dir=data_dir,
            framework=framework,
            arms=split_list(arms),
            learning_rates=parse_rates(split_list(learning_rate)),
            seeds=seeds,
            epochs=epochs,
            batch_size=batch_size,
            target_accuracy=target_accuracy,
            jobs=_parse_jobs(jobs),
            out=out,
        )
        with TerminalDisplay() as display:
            result = run_study(options, display)
        print_results(result.results)
        typer.echo(f"report: {result.report}")


def _parse_jobs(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise OptionError(f"--jobs {text!r} is neither a number nor auto")
    return int(text)


@contextlib.contextmanager
def _one_clear_line(debug: bool) -> Iterator[None]:
    """Turn what a user can cause into one line on stderr and a non-zero exit."""
    try:
        yield
    except KeyboardInterrupt as interrupted:
        _fail(str(interrupted) or "stopped", _INTERRUPTED)
    except BatchNormError as error:
        if debug:
            typer.echo(getattr(error, "details", None) or traceback.format_exc(), err=True)
        _fail(f"error: {error}", 2 if isinstance(error, OptionError) else 1)
    except OSError as error:
        if debug:
            typer.echo(traceback.format_exc(), err=True)
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"error: {where}{error.strerror or error}; every finished run is kept", 1)


def _fail(line: str, code: int) -> None:
    typer.echo(" ".join(line.splitlines()), err=True)
    sys.exit(code)
