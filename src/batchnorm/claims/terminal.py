"""Claims in the terminal: progress with the time left, the list, and the verdicts."""

from __future__ import annotations

import time
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from batchnorm.text_table import aligned

from .claim import Claim
from .registry import CLAIMS
from .runner import Progress as Quiet

_SECONDS_BETWEEN_LINES = 30.0


class TerminalProgress(Quiet):
    """A progress bar on a terminal, a line now and then elsewhere; on stderr: stdout is for the verdicts."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._experiments = self._finished = 0
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, seconds: float, experiments: int, finished: int) -> None:
        self._experiments, self._finished = experiments, finished
        kept = f", of which {finished} are there already" if finished else ""
        self._console.print(f"{experiments} experiments with a seed each{kept}")
        if self._console.is_terminal and seconds:
            self._bar = Progress(
                TextColumn("{task.fields[doing]}"),
                BarColumn(),
                TextColumn("{task.fields[finished]}/{task.fields[experiments]}"),
                TextColumn("time left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "", total=seconds, doing="", finished=finished, experiments=experiments
            )
            self._bar.start()

    def advance(self, claim: Claim, seed: int, seconds: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=seconds, doing=f"{claim.name}, seed {seed}")

    def ended(self, claim: Claim, seed: int) -> None:
        self._finished += 1
        if self._bar is not None:
            self._bar.update(self._task, finished=self._finished)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            done = f"{self._finished}/{self._experiments} experiments"
            self._console.print(f"{done}: {claim.name}, seed {seed} is measured")


def print_list() -> None:
    """Prints a line for each claim: number, name, and what was claimed."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for line in aligned([(str(claim.number), claim.name, claim.sentence) for claim in CLAIMS]):
        console.print(line)


def print_verdicts(results: dict[str, Any]) -> None:
    """Prints a table of the verdicts."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("claim", "verdict", "measured (95 % interval)"):
        table.add_column(heading)
    for row in results["claims"]:
        table.add_row(row["name"], row["verdict"], row["measured"])
    Console(highlight=False, markup=False, emoji=False).print(table)
