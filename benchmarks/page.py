"""The tables of README and docs, made from the result files between the markers `<!-- NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .device import page as device
from .lazily import function
from .results_file import FOLDER, load

ROOT = Path(__file__).parent.parent
_DOCS = (
    "accuracy",
    "benchmarks",
    "calibrate",
    "claims",
    "doctor",
    "fold",
    "gpu",
    "lean",
    "statistics",
    "study",
    "training",
)
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in _DOCS))
GPU_PAGE = ROOT / "docs" / "gpu.md"


# Marker -> the result file, and the function that shows it: imported when it is asked for, as some need more
# than a machine with a GPU has. The block `headline` takes several files.
BLOCKS: dict[str, tuple[str, str]] = {
    "accuracy": ("accuracy-cpu", "accuracy_page.accuracy_table"),
    "accuracy-summary": ("accuracy-cpu", "accuracy_page.accuracy_summary"),
    "layer-goals": ("layer-time-cpu", "layer_page.goals_table"),
    "layer-row-goals": ("layer-time-cpu", "layer_page.row_goals_table"),
    "losses": ("layer-time-cpu", "layer_page.losses_table"),
    "layer-time": ("layer-time-cpu", "layer_page.main_table"),
    "layer-time-others": ("layer-time-cpu", "layer_page.other_table"),
    "reuse-goals": ("layer-time-reuse-memory-cpu", "layer_page.reuse_goals_table"),
    "layer-time-reuse": ("layer-time-reuse-memory-cpu", "layer_page.layer_table"),
    "layer-bounds": ("layer-bounds-cpu", "layer_bounds.bounds_table"),
    "step-time": ("step-time-cpu", "layer_page.step_table"),
    "step-goals": ("step-time-cpu", "layer_page.step_goals_table"),
    "small-step-time": ("small-step-time-cpu", "small_steps.small_step_table"),
    "small-step-goals": ("small-step-time-cpu", "small_steps.goals_table"),
    "first-call": ("first-call-cpu", "first_call.first_call_table"),
    "first-call-goals": ("first-call-cpu", "first_call.goals_table"),
    "lean": ("lean-cpu", "lean_page.lean_table"),
    "lean-goals": ("lean-cpu", "lean_page.goals_table"),
    "accuracy-keras": ("accuracy-keras-cpu", "accuracy_page.keras_accuracy_table"),
    "step-time-keras": ("step-time-keras-cpu", "keras_layer.step_table"),
    "calibrate": ("calibrate-cpu", "calibrate.time_table"),
    "calibrate-memory": ("calibrate-cpu", "calibrate.memory_table"),
    "doctor-case": ("doctor-case", "doctor_case.case_table"),
    "doctor-cost": ("doctor-cpu", "doctor.cost_table"),
    "doctor-zoo": ("doctor-cpu", "doctor.zoo_table"),
    "doctor-faults": ("doctor-faults", "doctor_faults.faults_table"),
    "doctor-trained": ("doctor-trained", "doctor_trained.trained_table"),
    "calibration-report": ("calibration-digits", "calibrate.report_table"),
    "fold-zoo-goals": ("fold-zoo-cpu", "fold_page.zoo_goals_table"),
    "fold-zoo": ("fold-zoo-cpu", "fold_page.zoo_table"),
    "fold-inference": ("fold-inference-cpu", "fold_page.inference_table"),
    "policies": ("policies-cpu", "policies.policies_table"),
    "policies-goals": ("policies-cpu", "policies.goals_table"),
    "synced": ("synced-cpu", "synced.layers_table"),
    "synced-model": ("synced-cpu", "synced_model.fitted_table"),
    "synced-packets": ("synced-cpu", "synced.packets_table"),
    "claims": ("claims-cpu", "claims.verdicts_table"),
    "claims-rule": ("claims-cpu", "claims.rule"),
    "claims-parts": ("claims-cpu", "claims.claims_section"),
    "monitor": ("monitor-cpu", "monitor.monitor_table"),
    "study": ("study-cpu", "study.study_table"),
    "study-summary": ("study-cpu", "study.study_summary"),
}
# The same for files that have a device's name behind that of the section.
DEVICE_BLOCKS: dict[str, tuple[str, str]] = {
    "gpu-layer-goals": ("layers", "device.page.layer_goals"),
    "gpu-layers": ("layers", "device.page.layers_section"),
    "gpu-step-goals": ("steps", "device.page.step_goals"),
    "gpu-steps": ("steps", "device.page.steps_section"),
}


# Of a result file's provenance -> how a page says it.
_ORIGIN = {
    "commit": "commit {}",
    "cores": "{} cores",
    "threads": "threads: {}",
    "python": "Python {}",
    "torch": "torch {}",
    "batchnorm": "batchnorm {}",
}


def block(name: str, folder: Path = FOLDER) -> str:
    """Return a marked block: tables, and where they come from; or that they are still to be measured."""
    return f"<!-- {name} -->\n{_content(name, folder)}\n<!-- / -->"


def _content(name: str, folder: Path) -> str:
    if name == "gpu-state":
        return device.state(folder)
    if name == "headline":
        return str(function("headline.headline_table")(folder))
    if name in DEVICE_BLOCKS:
        section, show = DEVICE_BLOCKS[name]
        parts = [_shown(file, show, folder) for file in device.files(section, folder)]
        return "\n\n".join(parts) or function(show)([]) or "Not measured yet."
    file, show = BLOCKS[name]
    if not (folder / f"{file}.json").exists():
        return f"Not measured yet: `python -m benchmarks.run {file}`."
    return _shown(file, show, folder)


def _shown(file: str, show: str, folder: Path) -> str:
    found = load(file, folder)
    origin = ", ".join(
        _ORIGIN.get(key, "{}").format(value) for key, value in found["provenance"].items() if key != "command"
    )
    return f"{function(show)(found['rows'])}\n\n`benchmarks/results/{file}.json`: {origin}"


def filled(text: str) -> str:
    """Return a page's text with every marked block made anew."""
    return re.sub(r"<!-- ([a-z-]+) -->\n.*?<!-- / -->", lambda found: block(found[1]), text, flags=re.DOTALL)


def write(pages: Iterable[Path] = PAGES) -> None:
    """Make the blocks of pages anew."""
    for page in pages:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":  # for result files that come from another machine
    write()
    function("pictures.draw")()
