"""A case from start to end: a network trained on ordered, padded batches, found by the doctor and mended.

Handwritten digits are sequences of 28 columns of pixels, padded to 40 in training and to 120 where the
network is used. It is trained on small batches of one class each; then on batches drawn at random; then with
`batchnorm.mask` too; then calibrated. After each step the doctor looks at it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.doctor.findings import Diagnosis
from batchnorm.studies.data import load_digits
from batchnorm.studies.plots import canvas

from .tables import Row, Rows, table_of

IN_TRAINING, IN_USE = 40, 120  # columns
EPOCHS, QUICK_EPOCHS = 6, 3


class Digits(nn.Module):
    """Two convolutions along the columns, their mean over the columns that are not 0, a classifier."""

    def __init__(self, is_masked: bool) -> None:
        super().__init__()
        self.is_masked = is_masked
        self.convs = nn.Sequential(
            nn.Conv1d(28, 32, 5, padding=2, bias=False), batchnorm.BatchNorm1d(32), nn.ReLU(),
            nn.Conv1d(32, 32, 5, padding=2, bias=False), batchnorm.BatchNorm1d(32), nn.ReLU(),
        )  # fmt: skip
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[N, 10]` of images `[N, 28, columns]`; masked, columns of zeros count nowhere."""
        with batchnorm.mask(self.convs, (x != 0).any(1) if self.is_masked else None):
            found = self.convs(x)
        logits: Tensor = self.last(found.sum(2) / (found != 0).any(1).sum(1, keepdim=True).clamp(min=1))
        return logits


def measure(quick: bool = False) -> Rows:
    """Return a row per step: accuracy in use, and what the doctor finds."""
    digits = load_digits()
    x, x_use = torch.tensor(digits.x_train), torch.tensor(digits.x_test)
    x, x_use = F.pad(x, (0, IN_TRAINING - 28)), F.pad(x_use, (0, IN_USE - 28))
    y, y_use = torch.tensor(digits.y_train), torch.tensor(digits.y_test)
    epochs = QUICK_EPOCHS if quick else EPOCHS
    rows = []

    def look(step: str, model: Digits, batches: list[Tensor]) -> None:
        with torch.no_grad():
            accuracy = float((model(x_use).argmax(1) == y_use).float().mean())
        found = batchnorm.diagnose(model, [(x[part], y[part]) for part in batches])
        rows.append(_row(step, accuracy, found))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        by_class = [y.argsort(stable=True).split(8)[i] for i in torch.randperm(-(-len(y) // 8))]
        drawn = list(torch.randperm(len(y)).split(32))
        look("batches of 8, ordered by class", _trained(x, y, by_class, epochs, False), by_class)
        look("batches of 32, drawn at random", _trained(x, y, drawn, epochs, False), drawn)
        model = _trained(x, y, drawn, epochs, True)
        look("the same, padding masked", model, drawn)
        batchnorm.calibrate(model, x.split(500))
        look("the same, calibrated", model, drawn)
    return rows


def _trained(x: Tensor, y: Tensor, batches: Iterable[Tensor], epochs: int, is_masked: bool) -> Digits:
    torch.manual_seed(0)
    model = Digits(is_masked)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for part in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model.eval()


def _row(step: str, accuracy: float, found: Diagnosis) -> Row:
    findings = [f"{of.severity}: {of.check}" for of in found.findings if of.severity != "note"]
    return {"step": step, "accuracy": accuracy, "findings": findings, "scores": dict(found.scores)}


def case_table(rows: Rows) -> str:
    """Accuracy in use and findings after each step."""
    return table_of(
        {
            "trained on": row["step"],
            f"accuracy in use ({IN_USE} columns)": f"{row['accuracy']:.1%}",
            "on the training samples, by running / batch statistics": " / ".join(
                f"{row['scores'][name]:.1%}" for name in ("running", "batch")
            ),
            "the doctor finds": ", ".join(row["findings"]) or "nothing",
        }
        for row in rows
    )


def picture(rows: Rows) -> canvas.Picture:
    """Draw a line per step: accuracy in use, and on the training samples by two statistics."""
    columns = (
        ("in use", canvas.SUBJECT_COLOR, "o", [row["accuracy"] for row in rows]),
        ("training samples, running statistics", canvas.BASELINE_COLOR, "s", _scores(rows, "running")),
        ("training samples, each batch's own", canvas.OTHER_COLOR, "D", _scores(rows, "batch")),
    )

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        lines = []
        for offset, (name, color, marker, values) in zip((-0.28, -0.1, 0.08), columns, strict=True):
            places = [row + offset for row in range(len(rows))]
            lines += axes.plot(values, places, marker, color=color, markersize=5.5, label=name, clip_on=False)
        for number, row in enumerate(rows):
            told = ", ".join(row["findings"]) or "nothing is found"
            axes.text(0.02, number + 0.33, told, color=canvas.SOFT, fontsize=7.5, va="center")
        axes.set_yticks(range(len(rows)), [row["step"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.5)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set_xlabel("accuracy", loc="right")
        axes.yaxis.grid(False)
        canvas.legend(figure, lines, 1, 1.0)

    told = "; ".join(
        f"{row['step']}: {row['accuracy']:.1%} in use, {row['scores']['running']:.1%} by running statistics; "
        + (", ".join(row["findings"]) or "nothing is found")
        for row in rows
    )
    title = "Accuracy after each mend, and what the doctor finds"
    return canvas.draw("doctor", title, told, 1.1 + 0.62 * len(rows), paint, width=6.3)


def _scores(rows: Rows, name: str) -> list[float]:
    return [row["scores"][name] for row in rows]
