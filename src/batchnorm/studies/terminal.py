"""A study in the terminal: progress with the time left, and the table of results."""

from __future__ import annotations

import functools
import time
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from batchnorm.errors import in_one_line
from batchnorm.text_table import aligned

from .arms import KNOWN
from .data import SOURCES
from .display import Display
from .frameworks import framework_in_words
from .networks import NETWORKS
from .objectives import METRICS_IN_WORDS
from .settings import shown_number

_SECONDS_BETWEEN_LINES = 30.0
# Brackets and colons may be part of a name.
_plain_console = functools.partial(Console, highlight=False, markup=False, emoji=False)


class TerminalDisplay(Display):
    """A progress bar on a terminal, a line now and then elsewhere; on stderr: stdout is for the results."""

    def __init__(self) -> None:
        self._console = _plain_console(stderr=True, soft_wrap=True)
        self._bar: Progress | None = None
        self._bar_task = TaskID(0)
        self._runs = self._finished = self._steps = self._taken = 0
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_bar()

    def stage(self, text: str) -> None:
        self._end_bar()
        self._console.print(in_one_line(text))

    def training(self, runs: int, finished: int, steps: int, workers: int) -> None:
        self._runs, self._finished, self._steps, self._taken = runs, finished, steps, 0
        self._began = self._last_line = time.monotonic()
        kept = f", of which {finished} are finished already" if finished else ""
        self.stage(f"{runs} training runs{kept}, {workers} at a time")
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                TextColumn("{task.fields[finished]}/{task.fields[runs]} runs"),
                TextColumn("time left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar_task = self._bar.add_task("", total=steps, runs=runs, finished=finished)
            self._bar.start()

    def advance(self, steps: int) -> None:
        self._taken += steps
        if self._bar is not None:
            self._bar.advance(self._bar_task, steps)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES and self._taken > 0:
            self._last_line = time.monotonic()
            left = (self._last_line - self._began) * (self._steps - self._taken) / self._taken
            self._console.print(f"{self._finished}/{self._runs} runs, about {max(left, 0):.0f} s left")

    def run_ended(self, name: str, diverged: bool) -> None:
        self._finished += 1
        if self._bar is not None:
            self._bar.update(self._bar_task, finished=self._finished)
        if diverged:
            self.notice(f"{name}: diverged, its loss is no longer finite; kept as a result")

    def notice(self, text: str) -> None:
        self._console.print(in_one_line(text))

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def print_choices() -> None:
    """Prints a line for each data set, network and arm that a study knows by name."""
    choices = {
        "data": {name: source.description for name, source in SOURCES.items()},
        "network": {name: network.description for name, network in NETWORKS.items()},
        "arms": KNOWN,
    }
    rows = [(f"--{option}", *entry) for option, entries in choices.items() for entry in entries.items()]
    console = _plain_console(soft_wrap=True)
    for line in aligned(rows):
        console.print(line)
    console.print("Data and networks of your own: file.py:function. Arms are joined by +.")


def print_results(results: dict[str, Any]) -> None:
    """Prints one table per network: each arm at its best learning rate."""
    console = _plain_console()
    provenance = results["provenance"]
    target = f"{provenance['target_accuracy']:.0%}"
    metric = METRICS_IN_WORDS.get(provenance["metric"], provenance["metric"])
    framework = framework_in_words(provenance)
    for network, arms in results["networks"].items():
        kept = [measured["bytes_kept_for_backward"]["mean"] for measured in arms.values()]
        is_kept_known = any(size is not None for size in kept)
        data = ", ".join(one["name"] for one in provenance["data"])
        on = "" if " on " in network else f" on {data}"
        what = f"{network}{on}, each arm at its best learning rate"
        table = Table(
            title=in_one_line(what) + (f"\n{framework}" if framework else ""),
            box=SIMPLE_HEAD,  # without edges, for 80 columns
            show_edge=False,
            pad_edge=False,
            caption=f"{metric}: held-out; kB kept: "
            + ("from the forward of a step to its backward" if is_kept_known else "not measured"),
        )
        table.add_column("arm", no_wrap=True)
        headings = ("rate", metric, f"steps to {target}", "ms/step", "kB kept")
        for heading in headings if is_kept_known else headings[:-1]:
            table.add_column(heading, justify="right", no_wrap=True)
        for (arm, measured), size in zip(arms.items(), kept, strict=True):
            table.add_row(
                arm,
                shown_number(measured["best_learning_rate"]),
                _accuracy(measured),
                _steps(measured["steps_to_target"]),
                f"{1e3 * measured['seconds_per_step']['median']:.2f}",
                *(["not measured" if size is None else f"{1e-3 * size:,.0f}"] if is_kept_known else []),
            )
        console.print(table)


def _accuracy(measured: dict[str, Any]) -> str:
    accuracy = measured["test_accuracy"]
    if accuracy["mean"] is None:
        return "diverged"
    diverged = f" ({measured['diverged']} diverged)" if measured["diverged"] else ""
    return f"{accuracy['mean']:.1%} ± {100 * accuracy['std']:.1f}{diverged}"


def _steps(steps: dict[str, Any]) -> str:
    if steps["mean"] is None:
        return "never"
    missed = len(steps["values"]) - steps["reached"]
    return f"{steps['mean']:,.0f}" + (f" ({missed} never)" if missed else "")
