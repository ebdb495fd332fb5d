"""The pictures of README and docs, drawn from result files; `python -m benchmarks.page` draws them all."""

from __future__ import annotations

from pathlib import Path

from batchnorm.studies.plots import canvas

from .lazily import function
from .results_file import FOLDER, load

DOCS = Path(__file__).parent.parent / "docs"
# Name of the SVG file in docs/ -> the function that draws it, and the result files whose rows it takes.
PICTURES: dict[str, tuple[str, ...]] = {
    "headline": ("headline.picture", "study-cpu", "doctor-case", "fold-zoo-cpu"),
    "accuracy": ("accuracy_page.picture", "accuracy-cpu", "accuracy-keras-cpu"),
    "layer-time": ("time_pictures.layers", "layer-time-cpu"),
    "step-time": ("time_pictures.steps", "step-time-cpu", "small-step-time-cpu"),
    "lean": ("lean_page.picture", "lean-cpu"),
    "fold-zoo": ("fold_page.zoo_picture", "fold-zoo-cpu"),
    "fold-inference": ("fold_page.inference_picture", "fold-inference-cpu"),
    "calibration": ("calibrate.picture", "calibration-digits"),
    "doctor": ("doctor_case.picture", "doctor-case"),
}


def picture(name: str, folder: Path = FOLDER) -> canvas.Picture:
    """Draw one picture from the result files in a folder."""
    show, *files = PICTURES[name]
    drawn: canvas.Picture = function(show)(*(load(file, folder)["rows"] for file in files))
    return drawn


def draw(docs: Path = DOCS) -> None:
    """Draw all pictures anew."""
    for name in PICTURES:
        canvas.save(picture(name), docs / f"{name}.svg")
