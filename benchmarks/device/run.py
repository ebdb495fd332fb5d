"""Measures layers and steps on a device within a number of seconds; files are written after every case."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks import results_file
from benchmarks.tables import Row

from . import layer_cases, layers, page, steps
from .worker import Worker, device_facts

SECONDS = 540.0  # what all takes at most, with a minute to spare of ten
_STARTING = 120.0  # seconds in which a process must be there


class _Case(Protocol):
    def fields(self) -> dict[str, object]: ...


@dataclass(frozen=True)
class Section:
    """A result file.

    Attributes:
        cases: of a device, and whether for a quick look; most important first.
        measured: the row of a case.
        table: rows as text.
        share: of the time, in proportion to those of the sections that are measured behind it.
        limit: seconds of a case, the start of a process and compilers among them.
    """

    cases: Callable[[str, bool], Sequence[_Case]]
    measured: Callable[[Any], Row]
    table: Callable[[list[Row]], str]
    share: float
    limit: float


SECTIONS = {
    "layers": Section(layer_cases.cases, layers.measured, page.layers_text, 0.45, 60.0),
    "steps": Section(steps.cases, steps.measured, page.steps_text, 0.55, 180.0),
}


@dataclass(frozen=True)
class Wanted:
    """Options of the command line.

    Attributes:
        device: `cpu` or `cuda`.
        names: of SECTIONS.
        seconds: for all of it.
        folder: where files go; None = nowhere.
        origin: provenance, apart from the device's.
        quick: a look at a few small cases.
    """

    device: str
    names: tuple[str, ...]
    seconds: float
    folder: Path | None
    origin: Row
    quick: bool = False


def run(wanted: Wanted) -> None:
    """Measure the sections, and print their tables."""
    end = time.monotonic() + wanted.seconds
    with Worker() as worker:  # this process takes nothing of the device
        facts = worker.row(device_facts, wanted.device, _STARTING)
        if "missing" in facts:
            raise SystemExit(f"--device {wanted.device} cannot be used: {facts['missing']}")
        for number, name in enumerate(wanted.names):
            shares = [SECTIONS[other].share for other in wanted.names[number:]]
            left = max(0.0, end - time.monotonic())
            rows = measure(name, wanted, facts, worker, left * shares[0] / sum(shares), end)
            print(SECTIONS[name].table(rows), end="\n\n", flush=True)


def measure(name: str, wanted: Wanted, facts: Row, worker: Worker, seconds: float, end: float) -> list[Row]:
    """Return a section's rows, of every case; `missing` says why one has no figures.

    Args:
        name: of SECTIONS.
        wanted: device, and where its file goes.
        facts: `device_facts`.
        worker: in which cases are measured.
        seconds: after which no case is begun.
        end: when the last one is stopped, on `time.monotonic`.
    """
    section, begun = SECTIONS[name], time.monotonic()
    cases = section.cases(wanted.device, wanted.quick)
    rows: list[Row] = [
        case.fields() | {"missing": f"not reached in the {seconds:.0f} s of `{name}`"} for case in cases
    ]
    file = f"{name}-{slug(facts['device'])}"

    def write() -> None:
        if wanted.folder is not None:
            results_file.write(file, facts | wanted.origin, rows, wanted.folder)

    write()
    for number, case in enumerate(cases):
        now = time.monotonic()
        if now - begun >= seconds:
            break
        rows[number] = case.fields() | worker.row(section.measured, case, min(section.limit, end - now))
        _say(name, number, rows, begun)
        write()
    return rows


def slug(device: str) -> str:
    """Return a device's name as it stands in names of files."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")


def _say(name: str, number: int, rows: list[Row], begun: float) -> None:
    row = rows[number]
    what = ", ".join(
        str(row[key]) for key in ("network", "operation", "shape", "dtype", "layout") if key in row
    )
    rivals = {
        rival: f"{found['seconds'] * 1e3:.3g} ms"
        for rival, found in (row.get("rivals") or row.get("variants") or {}).items()
    }
    found = {**rivals, **row.get("failed", {})}
    said = row.get("missing", ", ".join(f"{rival} {text}" for rival, text in found.items()))
    print(
        f"{name} {number + 1}/{len(rows)}, {time.monotonic() - begun:.0f} s: {what}: {said}",
        file=sys.stderr,
        flush=True,
    )
