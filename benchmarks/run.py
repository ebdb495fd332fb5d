"""`python -m benchmarks.run`: measure, write results with provenance, and docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import accuracy, layer_time, page, results_file

MEASUREMENTS = {"accuracy-cpu": accuracy.measure, "layer-time-cpu": layer_time.measure}


def main(
    quick: Annotated[bool, typer.Option(help="A look in seconds; writes nothing.")] = False,
    out: Annotated[Path, typer.Option(help="Where the result files go.")] = results_file.FOLDER,
) -> None:
    """Measure accuracy and time of the layers against torch's own."""
    for name, measure in MEASUREMENTS.items():
        rows = measure(quick)
        typer.echo(page.TABLES[name](rows))
        if not quick:
            typer.echo(results_file.save(name, "python -m benchmarks.run", rows, out))
    if not quick and out == results_file.FOLDER:
        typer.echo(page.write())


if __name__ == "__main__":
    typer.run(main)
