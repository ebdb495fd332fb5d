"""The first screen of README: its picture and its table, of the figures that matter most."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from batchnorm.studies.plots import canvas

from .fold_page import share_absorbed
from .layer_cases import FORWARD_AND_BACKWARD, LARGE
from .results_file import load
from .tables import Row, Rows, table

_PADDED = "characters on languages"
_STEPS = ("ResNet-50", "MobileNetV2")

Bars = list[tuple[str, float, str]]  # name, share 0..1, colour


def picture(study: Rows, case: Rows, zoo: Rows) -> canvas.Picture:
    """Draw three groups of bars: train better, serve right, deploy lean."""
    groups = (
        ("Train better", "padded text in 60 languages: held-out accuracy", _of_padding(study)),
        ("Serve right", "a badly trained network: accuracy in use", _of_case(case)),
        ("Deploy lean", f"norms that leave {len(zoo)} networks for inference", _of_zoo(zoo)),
    )

    def paint(figure: Figure) -> None:
        figure.set_layout_engine("none")  # the engine rounds three panels otherwise from run to run
        edges = {"left": 0.29, "right": 0.985, "top": 0.9, "bottom": 0.02, "hspace": 0.42}
        rows = [len(bars) for *_, bars in groups]
        panels = figure.subplots(len(groups), height_ratios=rows, gridspec_kw=edges)
        for axes, (verb, what, bars) in zip(panels, groups, strict=True):
            axes.barh(range(len(bars)), [bar[1] for bar in bars], 0.68, color=[bar[2] for bar in bars])
            for row, (_, share, _) in enumerate(bars):
                axes.text(share + 0.012, row, f"{share:.0%}", va="center", color=canvas.INK)
            axes.set_title(verb, weight="bold")
            axes.set_title(what, loc="right", color=canvas.SOFT)
            axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], color=canvas.INK)
            axes.set_xlim(0, 1.09)
            axes.set_xticks([])
            axes.invert_yaxis()
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)

    told = ". ".join(
        f"{verb}, {what}: " + ", ".join(f"{name} {share:.1%}" for name, share, _ in bars)
        for verb, what, bars in groups
    )
    return canvas.draw("headline", "What batchnorm is for", f"{told}.", 2.75, paint, width=6.0)


def headline_table(folder: Path) -> str:
    """Return the figures of README: stock's, ours, and the result file of each."""

    def of(file: str) -> Rows:
        rows: Rows = load(file, folder)["rows"]
        return rows

    rows = (
        (_errors(of("accuracy-cpu")), "accuracy-cpu"),
        (_accuracies(of("study-cpu")), "study-cpu"),
        (_mended(of("doctor-case")), "doctor-case"),
        (_absorbed(of("fold-zoo-cpu")), "fold-zoo-cpu"),
        (_held(of("lean-cpu")), "lean-cpu"),
        (_layers(of("layer-time-cpu")), "layer-time-cpu"),
        (_steps(of("step-time-cpu")), "step-time-cpu"),
        (_small_step(of("small-step-time-cpu")), "small-step-time-cpu"),
    )
    header = ("", "without", "with batchnorm", "measured in")
    return table(header, [(*cells, f"[`{file}`](benchmarks/results/{file}.json)") for cells, file in rows])


def _of_padding(study: Rows) -> Bars:
    found = {row["arm"]: row["test_accuracy"]["mean"] for row in study if row["network"] == _PADDED}
    return [
        ("no normalization", found["none"], canvas.OTHER_COLOR),
        ("padding counts", found["batchnorm:unmasked"], canvas.BASELINE_COLOR),
        ("padding masked", found["batchnorm"], canvas.SUBJECT_COLOR),
    ]


def _of_case(case: Rows) -> Bars:
    names = ("as it was", "batches drawn at random", "padding masked", "calibrated")
    colors = (canvas.BASELINE_COLOR, *[canvas.SUBJECT_COLOR] * (len(names) - 1))
    return list(zip(names, [row["accuracy"] for row in case], colors, strict=True))


def _of_zoo(zoo: Rows) -> Bars:
    return [
        ("torch.fx", share_absorbed(zoo, by_fx=True), canvas.BASELINE_COLOR),
        ("fold", share_absorbed(zoo), canvas.SUBJECT_COLOR),
    ]


def _errors(rows: Rows) -> tuple[str, str, str]:
    found = {
        row["layer"]: row["y"]
        for row in rows
        if (row["layout"], row["mean_over_std"]) == ("channels-last", 1e5)
    }
    what = "largest error of an output, float32, channels-last, mean = 100,000 standard deviations"
    return what, f"{found['torch']:.0e}", f"{found['batchnorm']:.0e}"


def _accuracies(rows: Rows) -> tuple[str, str, str]:
    found = {row["arm"]: row["test_accuracy"] for row in rows if row["network"] == _PADDED}
    without, with_mask = (
        f"{found[arm]['mean']:.1%} ± {100 * found[arm]['std']:.1f}"
        for arm in ("batchnorm:unmasked", "batchnorm")
    )
    return "held-out accuracy on padded text", f"{without}, padding counts", f"{with_mask}, masked"


def _mended(rows: Rows) -> tuple[str, str, str]:
    what = "a network trained on ordered, padded batches: accuracy in use"
    return what, f"{rows[0]['accuracy']:.1%}", f"{rows[-1]['accuracy']:.1%}, fixed as `diagnose` says"


def _absorbed(rows: Rows) -> tuple[str, str, str]:
    fx, ours = share_absorbed(rows, by_fx=True), share_absorbed(rows)
    return f"norms that leave {len(rows)} networks for inference", f"{fx:.0%}, by `torch.fx`", f"{ours:.0%}"


def _held(rows: Rows) -> tuple[str, str, str]:
    held = {row["network"]: row["bytes_held"] for row in rows}
    megabytes = (
        ", ".join(f"{held[name][variant] / 1e6:.0f} MB" for name in _STEPS) for variant in ("stock", "lean")
    )
    return f"memory kept for the backward: {', '.join(_STEPS)}", *megabytes


def _layers(rows: Rows) -> tuple[str, str, str]:
    found = [
        row["ratios"]["stock / ours"]["median"]
        for row in rows
        if row["operation"] in FORWARD_AND_BACKWARD and row["dtype"] == "float32" and row["values"] > LARGE
    ]
    what = f"a layer in training on a CPU, {len(found)} cases over 2¹⁸ values: times as fast"
    return what, "1", f"{statistics.geometric_mean(found):.1f} (from {min(found):.1f} to {max(found):.1f})"


def _steps(rows: Rows) -> tuple[str, str, str]:
    found = {row["network"]: row["seconds"] for row in rows if row["layout"] == "contiguous"}
    milliseconds = (
        ", ".join(f"{found[name][variant] * 1e3:.0f} ms" for name in _STEPS) for variant in ("stock", "ours")
    )
    return f"a training step on a CPU: {', '.join(_STEPS)}", *milliseconds


def _small_step(rows: Rows) -> tuple[str, str, str]:
    row: Row = next(row for row in rows if (row["network"], row["threads"]) == ("MLP", 1))
    milliseconds = (f"{row['seconds'][variant] * 1e3:.2f} ms" for variant in ("stock", "drop-in"))
    return "the same of a small MLP, one thread", *milliseconds
