"""`batchnorm inspect`, `convert`, `calibrate` and `fold`: verbs on a model that a function builds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import batchnorm

from .one_line import one_clear_line, warnings_as_lines

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="file.py:function or package.module:function; it returns a module."),
]
Weights = Annotated[
    Path | None, typer.Option(help="Loaded into it: safetensors, or a torch checkpoint without code in it.")
]
Data = Annotated[
    str | None, typer.Option(help="digits, mnist, or your own as file.py:function, as for `study`.")
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with MNIST's IDX files or mnist.npz, or a cache of them.")
]
Samples = Annotated[int | None, typer.Option(help="How many of the training examples; all, unless given.")]
BatchSize = Annotated[int, typer.Option(help="Examples per batch.")]
Input = Annotated[
    str | None, typer.Option(help="Shape of an input, such as 1x3x224x224; examples of the data take it too.")
]
Out = Annotated[Path, typer.Option(help="File to write: .safetensors.")]
FoldOut = Annotated[
    Path, typer.Option(help="File to write: .onnx or .pt2 to run it, .safetensors its weights.")
]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]


def inspect(
    model: Model,
    weights: Weights = None,
    data: Data = None,
    data_dir: DataDir = None,
    batch_size: BatchSize = 16,
    input: Input = None,
    debug: Debug = False,
) -> None:
    """The batch normalizations of a model: what they are, how they are, what they fuse with.

    With data or an input shape, forwards with control flow are run on an example.
    """
    with _clearly(debug):
        from .model_files import Run

        run = Run(model, weights, data, data_dir, None, batch_size, input)
        _show(run.verb(batchnorm.inspect, run.example()))


def convert(
    model: Model,
    out: Out,
    weights: Weights = None,
    data: Data = None,
    data_dir: DataDir = None,
    batch_size: BatchSize = 16,
    input: Input = None,
    force: Force = False,
    debug: Debug = False,
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
    model: Model,
    data: Annotated[str, typer.Option(help="digits, mnist, or your own as file.py:function.")],
    out: Out,
    weights: Weights = None,
    data_dir: DataDir = None,
    samples: Samples = None,
    batch_size: BatchSize = 256,
    input: Input = None,
    method: Annotated[
        str,
        typer.Option(help="batch: one pass, as in training; layerwise: of the network as deployed, in more."),
    ] = "batch",
    resume: Annotated[
        Path | None,
        typer.Option(help="Where to note how far it has come; the same command goes on from there."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="SVG to draw: how far off each layer's statistics were.")
    ] = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Set running statistics to those of all training data, say how far off they were, write the state."""
    with _clearly(debug):
        from .model_files import Run, check_out, check_progress

        check_out(out, (".safetensors",), force)
        if picture is not None:
            check_out(picture, (".svg",), force, "--picture")
        if resume is not None:
            check_progress(resume, out, picture, weights)
        run = Run(model, weights, data, data_dir, samples, batch_size, input)
        options = {"progress": True, "method": method, "progress_file": resume}
        options["keep_progress"] = resume is not None  # until all is written
        report = run.verb(batchnorm.calibrate, run.batches(), **options)
        typer.echo(str(report))
        run.write(run.model, out, force)
        if picture is not None:
            from batchnorm.study.plots.calibration import draw

            draw(report, picture)
            typer.echo(f"written: {picture}")
        if resume is not None:
            with contextlib.suppress(OSError):  # all is done: a file that stays does no harm
                resume.unlink(missing_ok=True)


def fold(
    model: Model,
    out: FoldOut,
    weights: Weights = None,
    data: Data = None,
    data_dir: DataDir = None,
    batch_size: BatchSize = 16,
    input: Input = None,
    force: Force = False,
    debug: Debug = False,
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
        typer.echo(f"{_count(run.model) - _count(folded)} of {_count(run.model)} batch normalizations folded")
        run.write(folded, out, force, example)


COMMANDS: tuple[Callable[..., None], ...] = (inspect, convert, calibrate, fold)


@contextlib.contextmanager
def _clearly(debug: bool) -> Iterator[None]:
    with one_clear_line(debug), warnings_as_lines():
        yield


def _count(model: Any) -> int:
    return len(batchnorm.inspect(model).rows)


def _show(report: Any) -> None:
    """Print a report: coloured in a terminal, whole lines to a file or another program."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(report)
    else:
        typer.echo(str(report))
