"""Cost of calibrating: time against plain forwards over the same data, and memory by number of batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

import batchnorm
from batchnorm.statistics.calibration import CalibrationReport, LayerChange
from batchnorm.studies.data import load_digits
from batchnorm.studies.plots import calibration, canvas

from . import networks
from .interleaved import clocked, interleave, medians, ratio
from .progress import progress
from .resident import resident_bytes
from .tables import Row, Rows, table_of, with_quartiles

ROUNDS, QUICK_ROUNDS = 9, 2
SPILL = 10**10  # bytes
LAYERWISE_ROUNDS, LAYERWISE_BATCHES = 3, 2  # one takes as long as tens of forwards
# What is compared with one forward in evaluation over all of the data.
RIVALS = ("batch", "update_bn", "forward in training", "layerwise", "layerwise, spill")
COUNTS, QUICK_COUNTS = (10, 200), (4, 8)  # batches whose memory is compared


@dataclass(frozen=True)
class Case:
    """A network and its data: `batches` of `batch` images."""

    network: str
    batch: int
    side: int
    batches: int


CASES = (Case("ResNet-18", 8, 128, 6), Case("ResNet-50", 8, 128, 6), Case("MobileNetV2", 16, 128, 6))
QUICK_CASES = (Case("MobileNetV2", 8, 32, 2),)


def measure(quick: bool = False) -> Rows:
    """Return a row per network and maker of its norms: medians in seconds, and multiples of a forward."""
    cases = [(case, name) for case in (QUICK_CASES if quick else CASES) for name in networks.NORMS]
    # Memory first: in a process that has freed much, nothing that is allocated shows.
    memory = [_memory(method, QUICK_COUNTS if quick else COUNTS) for method in ("batch", "layerwise")]
    return [_timed(case, name, quick) for case, name in progress(cases, "calibrations")] + memory


def _timed(case: Case, norm: str, quick: bool) -> Row:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = networks.NETWORKS[case.network](networks.NORMS[norm])
        data = list(torch.randn(case.batches, case.batch, 3, case.side, case.side))
    few = data[:LAYERWISE_BATCHES]
    passes = batchnorm.calibrate(copy.deepcopy(model), few[:1], method="layerwise").passes
    layerwise = {
        "forward": _forward(copy.deepcopy(model).eval(), few),
        "layerwise": _calibrate(model, few, method="layerwise"),
        "layerwise, spill": _calibrate(model, few, method="layerwise", spill=SPILL),
    }
    one_pass = {
        "forward": _forward(copy.deepcopy(model).eval(), data),
        "forward in training": _forward(copy.deepcopy(model).train(), data),
        "update_bn": _update_bn(model, data),
        "batch": _calibrate(model, data),
    }
    seconds, over = {}, {}
    for steps, rounds in ((layerwise, LAYERWISE_ROUNDS), (one_pass, ROUNDS)):
        clocks = {name: clocked(step) for name, step in steps.items()}
        times = interleave(clocks, QUICK_ROUNDS if quick else rounds, warm_up=1)
        over |= {name: ratio(times[name], times["forward"]) for name in steps if name != "forward"}
        seconds |= medians(times)
    return {
        **asdict(case),
        "norms": norm,
        "passes": passes,
        "layerwise_batches": len(few),
        "seconds": seconds,
        "over_forward": over,
    }


def _forward(model: nn.Module, data: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            for batch in data:
                model(batch)

    return run


def _calibrate(model: nn.Module, data: list[Tensor], **options: Any) -> Callable[[], object]:
    own = copy.deepcopy(model)
    return lambda: batchnorm.calibrate(own, data, **options)


def _update_bn(model: nn.Module, data: list[Tensor]) -> Callable[[], object]:
    own = copy.deepcopy(model)
    return lambda: update_bn(data, own)


def _memory(method: str, counts: tuple[int, ...]) -> Row:
    """Return the most resident memory of calibrations over that before the first, by number of batches."""
    model = networks.NETWORKS["MobileNetV2"](networks.stock)
    stem = nn.Sequential(*list(model)[:6])  # 14 levels
    most: dict[str, int] = {}
    before = resident_bytes()
    for count in (counts[0], *counts):  # once more before, for what is allocated once
        samples = _Watched(count)
        batchnorm.calibrate(stem, samples, method=method)  # type: ignore[arg-type]
        most[str(count)] = samples.most - before
    return {"method": method, "most_resident_bytes": most}


class _Watched:
    """Batches that look at the process's memory as they are asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.most = count, 0

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count):
            yield torch.randn(8, 3, 64, 64)
            self.most = max(self.most, resident_bytes())


def time_table(rows: Rows) -> str:
    """Multiples of a forward in evaluation, per network."""
    return table_of(
        {
            "network": row["network"],
            "norms": row["norms"],
            "data": f"{row['batches']} × {row['batch']} × 3 × {row['side']}²",
            "a forward, ms": f"{row['seconds']['forward'] * 1e3:.0f}",
            **{name: with_quartiles(row["over_forward"][name]) for name in RIVALS},
            "passes": str(row["passes"]),
        }
        for row in rows
        if "network" in row
    )


def memory_table(rows: Rows) -> str:
    """Resident memory over that before, by number of batches."""
    return table_of(
        {"method": row["method"]}
        | {f"{n} batches, MB": f"{held / 1e6:.1f}" for n, held in row["most_resident_bytes"].items()}
        for row in rows
        if "most_resident_bytes" in row
    )


def table_of_both(rows: Rows) -> str:
    """Both tables."""
    return f"{time_table(rows)}\n\n{memory_table(rows)}"


def digits(quick: bool = False) -> Rows:
    """Return a row per layer of ResNet-18 after few steps on digits: how far its statistics were off."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = networks.NETWORKS["ResNet-18"](networks.stock)
        count = 128 if quick else 512
        found = load_digits()
        x = torch.tensor(found.x_train)[:count].view(-1, 1, 28, 28).expand(-1, 3, -1, -1)
        y = torch.tensor(found.y_train)[:count].long()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for batch in torch.randperm(count).split(64):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x[batch]), y[batch]))
            optimizer.step()
    report = batchnorm.calibrate(model, x.split(64), method="layerwise")
    return [
        {
            "samples": report.samples,
            "batches": report.batches,
            "passes": report.passes,
            "name": layer.name,
            "values": layer.values,
            "mean_shifts": [float(f"{shift:.4g}") for shift in layer.mean_shifts],
            "std_ratios": [float(f"{value:.4g}") for value in layer.std_ratios],
        }
        for layer in report.layers
    ]


def report_of(rows: Rows) -> CalibrationReport:
    """Return the report that rows of `digits` were made of."""
    layers = tuple(
        LayerChange(
            row["name"],
            row["values"],
            max(row["mean_shifts"]),
            max(row["std_ratios"], key=lambda value: max(value, 1 / value)),
            True,
            tuple(row["mean_shifts"]),
            tuple(row["std_ratios"]),
        )
        for row in rows
    )
    first = rows[0]
    return CalibrationReport(
        first["samples"], first["batches"], layers, (), method="layerwise", passes=first["passes"]
    )


def report_table(rows: Rows) -> str:
    """The report, as it prints."""
    return f"```\n{report_of(rows)}\n```"


def picture(rows: Rows) -> canvas.Picture:
    """Draw the picture of rows of `digits`."""
    return calibration.picture("calibration", report_of(rows))
