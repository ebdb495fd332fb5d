"""Runs a whole study: does missing runs in parallel, stores each, sums them up and writes the report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from batchnorm.errors import OptionError
from batchnorm.files import naming, write_whole

from .arms import UNMASKED, parse_arm
from .data import Dataset, load_data
from .display import Display
from .errors import StudyError, StudyInterrupted
from .frameworks import Framework, find_framework
from .json_files import json_safe, read_stored, settings_at, write_json
from .options import StudyOptions, display_name
from .pool import WorkerPool
from .records import Run, Timing
from .summary import curves_csv, summarize
from .tasks import RunTask, TimingTask, plan, settings_of


@dataclass(frozen=True)
class StudyResult:
    """The files of a study.

    Attributes:
        folder: everything is below it.
        results: the content of `results.json`.
        report: the page that shows it.
    """

    folder: Path
    results: dict[str, Any]
    report: Path


def run_study(options: StudyOptions, display: Display | None = None) -> StudyResult:
    """Trains networks in every arm, and write what came out.

    Files: `runs/*.json` (one per training run), `timing.json`, `results.json`, `curves.csv` and `report.html`
    below `options.folder`. Each is written whole or not at all. Runs that are there already are not done
    again if they were made with the same settings, data, code and versions; runs made with others are an
    error, never overwritten. A damaged record counts as not there. One study at a time works in a folder.

    Training and timing happen in processes of their own: this process's random state and threads stay as they
    are. From a script, call it under `if __name__ == "__main__":`, as everything that spawns processes.

    Raises:
        MissingExtraError: the framework is not installed.
        OptionError, DataError: an option or the data is wrong, or the folder holds another study's runs.
        StudyError: a network raised, a worker process died twice on the same run, or another study is at
            work in the folder.
        StudyInterrupted: Ctrl-C; every finished run is kept.
        FileError: a file could not be read or written; every finished run is kept.
    """
    framework = find_framework(options.framework)
    display = display or Display()
    data = load_data(options.data, options.data_dir, channels_last=options.framework == "keras")
    if options.batch_size > len(data.x_train):
        raise OptionError(
            f"--batch-size {options.batch_size} is more than the {len(data.x_train)} training examples"
        )
    if data.lengths_train is None and any(not parse_arm(arm).is_masked for arm in options.arms):
        raise OptionError(f"arm {UNMASKED} is for data with padding; {options.data} has none: use batchnorm")
    with _alone_in(options.folder):
        study = _Study(options, data, framework, display)
        runs, timing = study.measure()
        display.stage("writing the report")
        results = json_safe(summarize(options, data, runs, timing, framework))
        assert isinstance(results, dict)
        write_json(study.folder / "results.json", results)
        write_whole(study.folder / "curves.csv", curves_csv(runs))
        from .report import write_report

        return StudyResult(study.folder, results, write_report(study.folder))


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps a second study out of a folder, which is made if it is not there, until this one ends or dies.

    Raises:
        StudyError: another one is at work there.
        FileError: the folder, or the lock's file in it, cannot be made.
    """
    with naming(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    with naming(folder / ".lock", "written"):
        try:
            lock.acquire()
        except Timeout:
            raise StudyError(
                f"another study is at work in {folder}: wait until it has ended, or name another folder "
                "with --out"
            ) from None
    try:
        yield
    finally:
        lock.release()


class _Study:
    def __init__(self, options: StudyOptions, data: Dataset, framework: Framework, display: Display) -> None:
        self.options, self.data, self.framework, self.display = options, data, framework, display
        self.folder = options.folder
        self.runs_folder = options.folder / "runs"
        self.fingerprint = data.fingerprint()
        self.tasks = plan(options)

    def measure(self) -> tuple[list[Run], Timing]:
        """Does what is not on disk yet; return the runs as planned, and the timing."""
        with naming(self.runs_folder, "written"):
            self.runs_folder.mkdir(exist_ok=True)
        stored = {task: self._stored(task) for task in self.tasks}
        runs = {task: run for task, run in stored.items() if run is not None}
        try:
            with WorkerPool(self.options.workers, self.data, self.framework, self.display) as pool:
                timing = self._time(pool)
                self._train(pool, runs)
        except KeyboardInterrupt:
            finished = sum(self._path(task).exists() for task in self.tasks)
            raise StudyInterrupted(finished, len(self.tasks), self.folder) from None
        return [runs[task] for task in self.tasks], timing

    def _settings_of(self, task: RunTask | TimingTask) -> dict[str, object]:
        return settings_of(task, self.data, self.fingerprint, self.framework)

    def _path(self, task: RunTask) -> Path:
        return self.runs_folder / f"{task.name}.json"

    def _stored(self, task: RunTask) -> Run | None:
        settings = self._settings_of(task)
        run = read_stored(self._path(task), settings, Run)
        return run if run is not None and run.answers(settings) else None

    def _time(self, pool: WorkerPool) -> Timing:
        """Measures seconds per step while nothing else of ours runs, unless the same was measured before."""
        path, options = self.folder / "timing.json", self.options
        tasks = [TimingTask(network, options.arms, options.batch_size) for network in options.networks]
        settings = {display_name(task.network): self._settings_of(task) for task in tasks}
        before = settings_at(path)
        if before == json_safe(settings):
            stored = read_stored(path, settings, Timing)
            if stored is not None and stored.answers(settings, options.arms):
                return stored
        self.display.stage("timing the arms, one step at a time")
        # One after the other: two at a time would slow each other down.
        timed = {display_name(task.network): arms for task in tasks for _, arms in pool.run([task])}
        if settings_at(path) != before:
            raise StudyError(f"another study wrote {path} meanwhile: name another folder with --out")
        timing = Timing(timed)
        write_json(path, {"settings": settings, **vars(timing)})
        return timing

    def _train(self, pool: WorkerPool, runs: dict[RunTask, Run]) -> None:
        """Does the runs that are missing, and store each when it is finished."""
        missing = [task for task in self.tasks if task not in runs]
        if not missing:
            return
        steps = self.options.epochs * (len(self.data.x_train) // self.options.batch_size)
        workers = min(self.options.workers, len(missing))
        self.display.training(len(self.tasks), len(runs), steps * len(missing), workers)
        for task, run in pool.run(missing):
            assert isinstance(task, RunTask)
            self._stored(task)  # raises where another study's came meanwhile
            write_json(self._path(task), {"settings": self._settings_of(task), **vars(run)})
            runs[task] = run
            self.display.run_ended(task.describe(), run.diverged)
