"""`python -m benchmarks.run`: measure, write results with provenance, and the tables in README and docs."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import results_file
from .lazily import function

# Name of the result file -> what measures, and what shows the rows; imported when it is asked for, as no
# machine needs all that they are compared with.
MEASUREMENTS = {
    "accuracy-cpu": ("accuracy.measure", "accuracy_page.accuracy_table"),
    "layer-time-cpu": ("layer_time.measure", "layer_page.layer_table"),
    "layer-time-reuse-memory-cpu": ("layer_time.measure_reusing_memory", "layer_page.layer_table"),
    "layer-bounds-cpu": ("layer_bounds.measure", "layer_bounds.bounds_table"),
    "step-time-cpu": ("step_time.measure", "layer_page.step_table"),
    "small-step-time-cpu": ("small_steps.measure", "small_steps.small_step_table"),
    "first-call-cpu": ("first_call.measure", "first_call.first_call_table"),
    "lean-cpu": ("lean.measure", "lean_page.lean_table"),
    "accuracy-keras-cpu": ("keras_layer.accuracies", "accuracy_page.keras_accuracy_table"),
    "step-time-keras-cpu": ("keras_layer.step_times", "keras_layer.step_table"),
    "calibrate-cpu": ("calibrate.measure", "calibrate.table_of_both"),
    "calibration-digits": ("calibrate.digits", "calibrate.report_table"),
    "fold-zoo-cpu": ("fold_zoo.measure", "fold_page.zoo_table"),
    "fold-inference-cpu": ("fold_inference.measure", "fold_page.inference_table"),
    "policies-cpu": ("policies.measure", "policies.policies_table"),
    "synced-cpu": ("synced.measure", "synced.layers_table"),
    "monitor-cpu": ("monitor.measure", "monitor.monitor_table"),
    "doctor-case": ("doctor_case.measure", "doctor_case.case_table"),
    "doctor-cpu": ("doctor.measure", "doctor.tables"),
    "doctor-faults": ("doctor_faults.measure", "doctor_faults.faults_table"),
    "doctor-trained": ("doctor_trained.measure", "doctor_trained.trained_table"),
    "study-cpu": ("study.measure", "study.study_table"),
    "claims-cpu": ("claims.measure", "claims.verdicts_table"),
}
ON_A_DEVICE = ("layers", "steps")


def main(words: list[str] | None = None) -> None:
    """Measure what the command line asks for; all of it where it names nothing."""
    parser = _parser()
    asked = parser.parse_args(words)
    known = tuple(MEASUREMENTS) if asked.device is None else ON_A_DEVICE
    for name in asked.names:
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")
    if asked.device is None:
        _measure(asked.names or known, asked.quick, asked.out)
    else:
        _measure_on_device(parser, asked)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"which of {', '.join(MEASUREMENTS)}; with --device, of {', '.join(ON_A_DEVICE)}",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help=f"measure {' and '.join(ON_A_DEVICE)} on this device, and nothing else",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a look in seconds; writes only where --out says"
    )
    parser.add_argument("--out", type=Path, help="where the result files go; benchmarks/results if not said")
    parser.add_argument(
        "--seconds",
        type=float,
        help="with --device: for all of it (540); what is left out is said in the file",
    )
    parser.add_argument("--commit", help="what is measured, for a copy of the sources without git")
    return parser


def _measure(names: tuple[str, ...], quick: bool, out: Path | None) -> None:
    folder = out or (None if quick else results_file.FOLDER)
    for name in names:
        measure, show = map(function, MEASUREMENTS[name])
        rows = measure(quick)
        if folder is not None:
            print(results_file.save(name, f"python -m benchmarks.run {name}", rows, folder))
        print(show(rows))
    if folder == results_file.FOLDER:
        function("page.write")()
        function("pictures.draw")()


def _measure_on_device(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    import torch

    from . import page
    from .device import run

    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu tries the measurement without one")
    names = tuple(asked.names) or ON_A_DEVICE
    words = [f"--device {asked.device}", *asked.names, *(["--quick"] if asked.quick else [])]
    origin = results_file.provenance(" ".join(("python -m benchmarks.run", *words)))
    if asked.commit and origin["commit"] == "unknown":
        origin["commit"] = asked.commit
    folder = asked.out or (None if asked.quick else results_file.FOLDER)
    seconds = run.SECONDS if asked.seconds is None else asked.seconds
    run.run(run.Wanted(asked.device, names, seconds, folder, origin, asked.quick))
    if folder == results_file.FOLDER:
        page.write([page.GPU_PAGE])


if __name__ == "__main__":
    main()
