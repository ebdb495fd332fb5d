"""`batchnorm study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.errors import OptionError

from .one_line import one_clear_line


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
    with one_clear_line(debug, "every finished run is kept"):
        from batchnorm.study import StudyOptions, run_study
        from batchnorm.study.options import parse_rates, split_list
        from batchnorm.study.terminal import TerminalDisplay, print_results

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
