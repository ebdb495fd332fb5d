"""`python -m benchmarks.run`: measure, write results with provenance, and the tables in README and docs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import (
    accuracy,
    calibrate,
    fold_inference,
    fold_page,
    fold_zoo,
    keras_layer,
    layer_bounds,
    layer_page,
    layer_time,
    lean,
    lean_page,
    page,
    policies,
    results_file,
    roofline,
    step_time,
    study,
    synced,
)

MEASUREMENTS = {
    "accuracy-cpu": (accuracy.measure, page.accuracy_table),
    "layer-time-cpu": (layer_time.measure, layer_page.layer_table),
    "layer-time-reuse-memory-cpu": (layer_time.measure_reusing_memory, layer_page.layer_table),
    "layer-bounds-cpu": (layer_bounds.measure, layer_bounds.bounds_table),
    "step-time-cpu": (step_time.measure, layer_page.step_table),
    "lean-cpu": (lean.measure, lean_page.lean_table),
    "accuracy-keras-cpu": (keras_layer.accuracies, page.keras_accuracy_table),
    "step-time-keras-cpu": (keras_layer.step_times, page.keras_step_table),
    "calibrate-cpu": (calibrate.measure, calibrate.table_of_both),
    "calibration-digits": (calibrate.digits, calibrate.report_table),
    "fold-zoo-cpu": (fold_zoo.measure, fold_page.zoo_table),
    "fold-inference-cpu": (fold_inference.measure, fold_page.inference_table),
    "policies-cpu": (policies.measure, policies.policies_table),
    "synced-cpu": (synced.measure, synced.layers_table),
    "study-digits": (study.measure, page.study_table),
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Which of {', '.join(MEASUREMENTS)}.")] = None,
    quick: Annotated[bool, typer.Option(help="A look in seconds; writes nothing.")] = False,
    out: Annotated[Path, typer.Option(help="Where the result files go.")] = results_file.FOLDER,
) -> None:
    """Measure accuracy, time and the default study; all of them where no name is given."""
    for name in names or MEASUREMENTS:
        if name not in MEASUREMENTS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(MEASUREMENTS)}")
    for name in names or MEASUREMENTS:
        measure, table = MEASUREMENTS[name]
        rows = measure(quick)
        if not quick:
            typer.echo(results_file.save(name, f"python -m benchmarks.run {name}", rows, out))
        typer.echo(table(rows))
    if not quick and out == results_file.FOLDER:
        roofline.draw(results_file.load("layer-time-cpu")["rows"])
        calibrate.draw(results_file.load("calibration-digits")["rows"])
        lean_page.draw(results_file.load("lean-cpu")["rows"])
        page.write()


if __name__ == "__main__":
    typer.run(main)
