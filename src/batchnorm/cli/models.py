"""Defines the verbs as commands on a model that a function builds: `inspect`, `doctor` and others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

import batchnorm

from . import options
from .errors import one_clear_line, warnings_as_lines


def inspect(
    model: options.Model,
    weights: options.Weights = None,
    data: options.Data = None,
    data_dir: options.DataDir = None,
    batch_size: options.BatchSize = 16,
    input: options.Input = None,
    debug: options.Debug = False,
) -> None:
    """The batch normalizations of a model: what they are, how they are, what they fuse with.

    With data or an input shape, forwards with control flow are run on an example.
    """
    with _clearly(debug):
        from .model_files import Run

        run = Run(model, weights, data, data_dir, None, batch_size, input)
        _show(run.verb(batchnorm.inspect, run.example()))


def doctor(
    model: options.Model,
    weights: options.Weights = None,
    data: options.Data = None,
    data_dir: options.DataDir = None,
    samples: options.DoctorSamples = 512,
    batch_size: options.BatchSize = 32,
    input: options.Input = None,
    out: options.Page = None,
    json: options.Json = False,
    strict: options.Strict = False,
    ignore: options.Ignore = "",
    force: options.Force = False,
    debug: options.Debug = False,
) -> None:
    """What is wrong with the batch normalizations of a model, on data where some is given, and what to do.

    A model that is returned in training mode is looked at in evaluation. Batches are drawn at random; on data
    with padding, the model is called as model(x, lengths).
    """
    with _clearly(debug):
        from .model_files import Run, check_out

        if out is not None:
            check_out(out, (".html",), force)
        run = Run(model, weights, data, data_dir, None, batch_size, input, takes_lengths=True)
        if all(module.training for module in run.model.modules()):
            run.model.eval()
        given = {"samples": samples, "ignore": [name.strip() for name in ignore.split(",") if name.strip()]}
        found = run.verb(batchnorm.diagnose, **run.diagnosed(samples), **given)
        typer.echo(found.to_json() if json else str(found))
        if out is not None:
            from batchnorm.studies.doctor_page import write_page

            write_page(found, out)
            typer.echo(f"written: {out}", err=json)
        if strict and found.is_serious:
            raise typer.Exit(1)


def convert(
    model: options.Model,
    out: options.Out,
    weights: options.Weights = None,
    data: options.Data = None,
    data_dir: options.DataDir = None,
    batch_size: options.BatchSize = 16,
    input: options.Input = None,
    force: options.Force = False,
    debug: options.Debug = False,
) -> None:
    """Make stock layers ours, compare on an example, and write the state.

    A layer's state has the same keys before and after; frozen layers of torchvision, timm and transformers
    gain those that they lack. The state fits the model that `batchnorm.convert(function())` makes.
    """
    with _clearly(debug):
        from .model_files import Run, check_out

        check_out(out, (".safetensors",), force)
        run = Run(model, weights, data, data_dir, None, batch_size, input)
        example = run.example()
        converted = run.verb(batchnorm.convert, example=example)
        rows = batchnorm.inspect(converted).rows
        ours = sum(row.kind.startswith("batchnorm.") for row in rows)
        agreed = "" if example is None else ", which give the same outputs on the example"
        typer.echo(f"{ours} of {len(rows)} batch normalizations are layers of batchnorm now{agreed}")
        run.write(converted, out, force)


def calibrate(
    model: options.Model,
    data: options.CalibrationData,
    out: options.Out,
    weights: options.Weights = None,
    data_dir: options.DataDir = None,
    samples: options.Samples = None,
    batch_size: options.BatchSize = 256,
    input: options.Input = None,
    method: options.Method = "batch",
    resume: options.Resume = None,
    picture: options.Picture = None,
    force: options.Force = False,
    debug: options.Debug = False,
) -> None:
    """Set running statistics to those of all training data, say how far off they were, write the state."""
    with _clearly(debug):
        from .model_files import Run, check_out, check_progress

        check_out(out, (".safetensors",), force)
        if picture is not None:
            check_out(picture, (".svg",), force, "--picture")
        if resume is not None:
            check_progress(resume, out, picture, weights)
        run = Run(model, weights, data, data_dir, samples, batch_size, input, takes_lengths=True)
        kept = resume is not None  # until all is written
        given = {"progress": True, "method": method, "progress_file": resume, "keep_progress": kept}
        report = run.verb(batchnorm.calibrate, **run.calibration(), **given)
        typer.echo(str(report))
        run.write(run.model, out, force)
        if picture is not None:
            from batchnorm.studies.plots.calibration import draw

            draw(report, picture)
            typer.echo(f"written: {picture}")
        if resume is not None:
            with contextlib.suppress(OSError):  # all is done: a file that stays does no harm
                resume.unlink(missing_ok=True)


def fold(
    model: options.Model,
    out: options.FoldOut,
    weights: options.Weights = None,
    data: options.Data = None,
    data_dir: options.DataDir = None,
    batch_size: options.BatchSize = 16,
    input: options.Input = None,
    force: options.Force = False,
    debug: options.Debug = False,
) -> None:
    """Fold norms into the weights before or after them, compare on an example, and write a model to run.

    A folded model has other modules than the function builds. As .onnx or .pt2 it runs without Python code of
    yours; its .safetensors fit the model that `batchnorm.fold(function())` makes.
    """
    with _clearly(debug):
        from .model_files import Run, check_exporter, check_out

        check_out(out, (".safetensors", ".onnx", ".pt2"), force)
        check_exporter(out.suffix)
        run = Run(model, weights, data, data_dir, None, batch_size, input)
        example = run.example(needed=out.suffix != ".safetensors")
        run.model.eval()
        folded = run.verb(batchnorm.fold, example)
        before, after = (len(batchnorm.inspect(model).rows) for model in (run.model, folded))
        typer.echo(f"{before - after} of {before} batch normalizations folded")
        run.write(folded, out, force, example)


@contextlib.contextmanager
def _clearly(debug: bool) -> Iterator[None]:
    with one_clear_line(debug), warnings_as_lines():
        yield


def _show(report: object) -> None:
    """Print a report: coloured in a terminal, whole lines to a file or another program."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(report)
    else:
        typer.echo(str(report))
