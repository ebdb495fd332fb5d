"""A whole study: what is left to do, done in parallel, stored run by run, summed up and reported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from batchnorm.errors import OptionError
from batchnorm.files import naming, write_whole

from .data import Dataset, load_data
from .display import Display, Quiet
from .errors import StudyError, StudyInterrupted
from .frameworks import Framework, find_framework
from .options import StudyOptions, display_name
from .pool import Died, Finished, Progress, WorkerPool
from .records import Record, json_safe, read_finished, read_if_same, settings_at, write_json
from .run_form import Timing, is_run, is_timing
from .summary import curves_csv, summarize
from .tasks import RunTask, TimingTask, plan, settings_of


@dataclass(frozen=True)
class StudyResult:
    """What a study leaves.

    Attributes:
        folder: everything is below it.
        results: the content of `results.json`.
        report: the page that shows it.
    """

    folder: Path
    results: dict[str, Any]
    report: Path


def run_study(options: StudyOptions, display: Display | None = None) -> StudyResult:
    """Train networks in every arm, and write what came out.

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
    display = display or Quiet()
    data = load_data(options.data, options.data_dir)
    if options.batch_size > len(data.x_train):
        raise OptionError(
            f"--batch-size {options.batch_size} is more than the {len(data.x_train)} training examples"
        )
    with _alone_in(options.folder):
        study = _Study(options, data, framework, display)
        records, timing, threads = study.measure()
        display.stage("writing the report")
        results = json_safe(summarize(options, data, records, timing, threads, framework))
        assert isinstance(results, dict)
        write_json(study.folder / "results.json", results)
        write_whole(study.folder / "curves.csv", curves_csv(records))
        from .report import write_report

        return StudyResult(study.folder, results, write_report(study.folder))


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep a second study out of a folder, which is made if it is not there, until this one ends or dies.

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
        self.fingerprint = data.fingerprint()
        self.tasks = plan(options)

    def measure(self) -> tuple[list[Record], Timing, int]:
        """Do what is not on disk yet; the records as planned, the timing, and the threads it used."""
        with naming(self._runs, "written"):
            self._runs.mkdir(exist_ok=True)
        settings = {task: self._settings_of(task) for task in self.tasks}
        records: dict[RunTask, Record] = {}
        for task in self.tasks:
            if (record := self._stored(task, settings[task])) is not None:
                records[task] = record
        try:
            with WorkerPool(self.options.workers, self.data, self.framework) as pool:
                timing, threads = self._time(pool)
                missing = [task for task in self.tasks if task not in records]
                if missing:
                    self._train(pool, missing, settings, records)
        except KeyboardInterrupt:
            finished = sum(self._path(task).exists() for task in self.tasks)
            raise StudyInterrupted(finished, len(self.tasks), self.folder) from None
        return [records[task] for task in self.tasks], timing, threads

    @property
    def _runs(self) -> Path:
        return self.folder / "runs"

    def _settings_of(self, task: RunTask | TimingTask) -> dict[str, object]:
        return settings_of(task, self.data, self.fingerprint, self.framework)

    def _path(self, task: RunTask) -> Path:
        return self._runs / f"{task.name}.json"

    def _stored(self, task: RunTask, settings: dict[str, object]) -> Record | None:
        return read_finished(self._path(task), settings, lambda record: is_run(record, settings))

    def _time(self, pool: WorkerPool) -> tuple[Timing, int]:
        """Measure seconds per step while nothing else of ours runs, unless the same was measured before."""
        path = self.folder / "timing.json"
        tasks = [
            TimingTask(network, self.options.arms, self.options.batch_size)
            for network in self.options.networks
        ]
        settings = {display_name(task.network): self._settings_of(task) for task in tasks}
        before = settings_at(path)
        arms = dict.fromkeys(settings, self.options.arms)
        if (stored := read_if_same(path, settings, lambda found: is_timing(found, arms))) is not None:
            return stored["timing"], stored["threads"]
        self.display.stage("timing the arms, one step at a time")
        timing: Timing = {}
        threads = 1
        for task in tasks:
            for event in pool.run([task]):
                if isinstance(event, Finished):
                    timing[display_name(task.network)] = event.result["arms"]
                    threads = event.result["threads"]
                elif isinstance(event, Died):
                    self.display.notice(
                        f"a worker process died, {event.how}, on {task.describe()}; it is done again"
                    )
        if settings_at(path) != before:
            raise StudyError(f"another study wrote {path} meanwhile: name another folder with --out")
        write_json(path, {"settings": settings, "threads": threads, "timing": timing})
        return timing, threads

    def _train(
        self,
        pool: WorkerPool,
        missing: list[RunTask],
        settings: dict[RunTask, dict[str, object]],
        records: dict[RunTask, Record],
    ) -> None:
        steps = self.options.epochs * (len(self.data.x_train) // self.options.batch_size)
        workers = min(self.options.workers, len(missing))
        self.display.training(len(self.tasks), len(records), steps * len(missing), workers)
        reported: dict[object, int] = {}
        for event in pool.run(missing):
            if isinstance(event, Progress):
                reported[event.task] = reported.get(event.task, 0) + event.steps
                self.display.advance(event.steps)
            elif isinstance(event, Died):
                self.display.notice(
                    f"a worker process died, {event.how}, on {event.task.describe()}; the run is done again"
                )
            else:
                assert isinstance(event.task, RunTask)
                record = {"settings": settings[event.task], **event.result}
                self._stored(event.task, settings[event.task])  # raises where another study's came meanwhile
                write_json(self._path(event.task), record)
                records[event.task] = json_safe(record)  # type: ignore[assignment]
                self.display.advance(steps - reported.get(event.task, 0))
                self.display.run_ended(event.task.describe(), record["status"] == "diverged")
