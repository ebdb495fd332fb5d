"""A study in the terminal: progress with the time left, and the table of results."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from batchnorm.errors import in_one_line
from batchnorm.text_table import aligned

from .arms import KNOWN
from .data import SOURCES
from .display import Display
from .frameworks import framework_in_words
from .networks import NETWORKS
from .objectives import metric_in_words
from .records import Run
from .settings import shown_number

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_OF_SPEED = 3600.0  # all of them: the speed of arms differs, that of the whole does not
_BARS = "▁▂▃▄▅▆▇█"
# Brackets and colons may be part of a name.
_plain_console = functools.partial(Console, highlight=False, markup=False, emoji=False)


class TerminalDisplay(Display):
    """Shows a study while it runs, on stderr: stdout is for the results.

    On a terminal it is a table of the setting that is trained, with a curve of held-out accuracy by arm,
    above a bar with the time left; elsewhere a line now and then. Each setting's verdict is a line when it is
    there.
    """

    def __init__(self) -> None:
        self._console = _plain_console(stderr=True, soft_wrap=True)
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.fields[finished]}/{task.fields[runs]} runs"),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=_SECONDS_OF_SPEED,
        )
        self._bar_task = TaskID(0)
        self._runs = self._finished = 0
        self._is_published = False
        self._work = self._done = 0.0
        self._so_far: dict[str, list[Run]] = {}  # by setting, of those that are not complete
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_live()

    def stage(self, text: str) -> None:
        self._end_live()
        self._console.print(in_one_line(text))

    def training(self, runs: int, finished: int, work: float, workers: int) -> None:
        self._runs, self._finished, self._work, self._done = runs, finished, work, 0.0
        self._began = self._last_line = time.monotonic()
        kept = f", of which {finished} are finished already" if finished else ""
        self.stage(f"{runs} training runs{kept}, {workers} at a time")
        if self._console.is_terminal:
            self._bar_task = self._bar.add_task("", total=work, runs=runs, finished=finished)
            self._live = Live(self._view(), console=self._console, transient=True, refresh_per_second=4)
            self._live.start()

    def advance(self, work: float) -> None:
        self._done += work
        if self._live is not None:
            self._bar.advance(self._bar_task, work)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES and self._done > 0:
            self._last_line = time.monotonic()
            left = (self._last_line - self._began) * (self._work - self._done) / self._done
            self._console.print(f"{self._finished}/{self._runs} runs, about {max(left, 0):.0f} s left")

    def run_ended(self, name: str, setting: str, run: Run) -> None:
        self._finished += 1
        self._so_far.setdefault(setting, []).append(run)
        if self._live is not None:
            self._bar.update(self._bar_task, finished=self._finished)
            self._live.update(self._view())
        if run.diverged:
            self.notice(f"{name}: diverged, its loss is no longer finite; kept as a result")

    def setting_ended(self, setting: str, verdict: str) -> None:
        self._so_far.pop(setting, None)
        self.notice(f"{setting}: {verdict}")

    def published(self, report: Path) -> None:
        if not self._is_published:
            self._is_published = True
            self.notice(f"the report so far, which follows the study: {report}")

    def notice(self, text: str) -> None:
        self._console.print(in_one_line(text))

    def _view(self) -> Group:
        return Group(*(_table_so_far(name, runs) for name, runs in self._so_far.items()), self._bar)

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._bar.remove_task(self._bar_task)


def _table_so_far(setting: str, runs: Sequence[Run]) -> Table:
    """Returns a table of a setting's arms, each at the rate that is its best so far."""
    table = Table(title=in_one_line(f"{setting}, so far"), box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for heading in ("rate", "seeds", "held-out"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("by epoch", no_wrap=True)
    for arm in dict.fromkeys(run.arm for run in runs):
        by_rate: dict[float, list[Run]] = {}
        for run in runs:
            if run.arm == arm:
                by_rate.setdefault(run.learning_rate, []).append(run)
        best = max(by_rate, key=lambda rate: fmean(run.accuracy for run in by_rate[rate]))
        found = [run for run in by_rate[best] if not run.diverged]
        curves = zip(*([epoch.test_accuracy for epoch in run.epochs] for run in found), strict=False)
        table.add_row(
            arm,
            shown_number(best),
            str(len(by_rate[best])),
            f"{fmean(run.accuracy for run in found):.1%}" if found else "diverged",
            "".join(map(_bar_of, map(fmean, curves))),
        )
    return table


def _bar_of(share: float) -> str:
    """Returns a bar as high as a fraction from 0 to 1."""
    return _BARS[min(max(int(share * len(_BARS)), 0), len(_BARS) - 1)] if math.isfinite(share) else " "


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
    metric = metric_in_words(provenance.get("metric", "accuracy"))
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
        table.add_column("arm", overflow="fold")
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
