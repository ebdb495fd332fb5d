"""Defines the `batchnorm` command: its version, `study`, `claims`, `env`, and the verbs on a model."""

from __future__ import annotations

from typing import Annotated

import typer

import batchnorm
from batchnorm.errors import OptionError

from . import models, options
from .claims import claims
from .errors import one_clear_line

app = typer.Typer(
    help="Batch normalization for PyTorch and Keras.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    data: options.StudyData = "digits,vowels,languages",
    data_dir: options.DataDir = None,
    network: options.Networks = "auto",
    depth: options.Depths = "",
    framework: options.Framework = "torch",
    arms: options.Arms = "auto",
    optimizer: options.Optimizer = "adam",
    momentum: options.Momentum = None,
    weight_decay: options.WeightDecay = 0.0,
    learning_rate: options.LearningRates = "auto",
    seeds: options.Seeds = 5,
    epochs: options.Epochs = "auto",
    batch_size: options.StepSizes = "auto",
    loss: options.Loss = "cross_entropy",
    metric: options.Metric = None,
    target_accuracy: options.TargetAccuracy = 0.85,
    jobs: options.Jobs = "auto",
    executor: options.Executor = None,
    out: options.StudyOut = None,
    list_choices: options.ListChoices = False,
    debug: options.Debug = False,
) -> None:
    """What does batch normalization buy this network on this data?

    Trains each network on each data set in each arm, at each learning rate, with each seed, and writes
    report.html, results.json and curves.csv. Ctrl-C keeps every finished run; the same command goes on from
    there.
    """
    with one_clear_line(debug, "every finished run is kept"):
        from batchnorm.studies import StudyOptions, run_study
        from batchnorm.studies.options import parse_numbers, split_list
        from batchnorm.studies.terminal import TerminalDisplay, print_choices, print_results

        if list_choices:
            print_choices()
            return
        chosen = StudyOptions(
            networks=split_list(network),
            data=split_list(data),
            data_dir=data_dir,
            framework=framework,
            arms=split_list(arms),
            learning_rates=_parse_rates(learning_rate),
            seeds=seeds,
            epochs=_parse_count("--epochs", epochs),
            batch_sizes=parse_numbers(split_list(batch_size), int, "batch size")
            if batch_size != "auto"
            else (),
            depths=parse_numbers(split_list(depth), int, "depth"),
            optimizer=optimizer,
            momentum=momentum,
            weight_decay=weight_decay,
            loss=loss,
            metric=metric,
            target_accuracy=target_accuracy,
            jobs=_parse_count("--jobs", jobs),
            executor=executor,
            out=out,
        )
        with TerminalDisplay() as display:
            result = run_study(chosen, display)
        print_results(result.results)
        typer.echo(f"report: {result.report}")


@app.command()
def env(json: options.Json = False) -> None:
    """What batchnorm runs on, for a bug report: versions, devices, engine, and where compiled kernels are.

    This command works without the extra `study`, too.
    """
    from .environment import environment, in_words

    typer.echo(in_words(environment(), as_json=json))


def _parse_rates(text: str) -> tuple[float, ...] | None:
    from batchnorm.studies.options import parse_numbers, split_list

    return None if text == "auto" else parse_numbers(split_list(text), float, "learning rate")


def _parse_count(option: str, text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise OptionError(f"{option} {text!r} is neither a number nor auto")
    return int(text)


for command in (claims, models.inspect, models.doctor, models.convert, models.calibrate, models.fold):
    app.command()(command)
