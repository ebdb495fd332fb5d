"""Runs a whole study: does missing runs in parallel, stores each, sums them up and writes the report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from batchnorm.errors import OptionError, naming_the_extra
from batchnorm.files import naming, write_whole

from .arms import UNMASKED, timed_with
from .data import Dataset, load_data, source_named
from .display import Display
from .errors import StudyError, StudyInterrupted
from .frameworks import Framework, find_framework
from .json_files import json_safe, read_stored, settings_at, write_json
from .objectives import targets_of
from .options import StudyOptions
from .padding import Padded
from .pool import Pool, WorkerPool
from .records import Run, Timing
from .schedule import ReportSchedule
from .settings import Setting, display_name, setting_names
from .summary import curves_csv, summarize, verdict_on
from .tasks import RunTask, TimingTask, plan, settings_of
from .training import EVALUATION_BATCH
from .user_code import is_user_code
from .worker import Task


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

    def _repr_html_(self) -> str:
        """Shows the report within a notebook."""
        from .html_page import frame

        return frame(self.report)


def run_study(
    options: StudyOptions, display: Display | None = None, loaded: Mapping[str, Dataset] | None = None
) -> StudyResult:
    """Trains networks in every arm, and writes what came out.

    Files: `runs/*.json` (one per training run), `timing.json`, `results.json`, `curves.csv` and `report.html`
    below `options.folder`. Each is written whole or not at all; the last three also in between, of the runs
    that are there. Runs that are there already are not done
    again if they were made with the same settings, data, code and versions; runs made with others are an
    error, never overwritten. A damaged record counts as not there. One study at a time works in a folder.

    Training and timing happen in processes of their own: this process's random state and threads stay as they
    are. From a script, call it under `if __name__ == "__main__":`, as everything that spawns processes.

    Args:
        options: of the study.
        display: hears how far it is.
        loaded: data that is here already, by its name in `options.data`.

    Raises:
        MissingExtraError: the framework, or what the executor needs, is not installed.
        OptionError, DataError: an option or the data is wrong, or the folder holds another study's runs.
        StudyError: a network raised, a worker process died twice on the same run, another study is at work in
            the folder, or the executor's cluster cannot be used.
        StudyInterrupted: Ctrl-C; every finished run is kept.
        FileError: a file could not be read or written; every finished run is kept.
    """
    framework = find_framework(options.framework)
    display = display or Display()
    data = {name: _load(name, options, display, loaded or {}) for name in options.data}
    with_padding = [name for name, one in data.items() if isinstance(one.train, Padded)]
    options = replace(options, padded=tuple(with_padding))
    if UNMASKED in options.arms and not with_padding:
        raise OptionError(
            f"arm {UNMASKED} is for data with padding; {options.data[0]} has none: use batchnorm"
        )
    pool = _pool(options, data, framework, display)
    with _alone_in(options.folder):
        study = _Study(options, data, framework, display, pool)
        runs, timing = study.measure()
        display.stage("writing the report")
        return study.publish(runs, timing)


def _load(name: str, options: StudyOptions, display: Display, loaded: Mapping[str, Dataset]) -> Dataset:
    is_keras, targets = options.framework == "keras", targets_of(options.loss)
    if is_user_code(name) and name not in loaded:
        display.stage(f"reading {display_name(name)}")
    data = loaded.get(name) or load_data(name, options.data_dir, channels_last=is_keras, targets=targets)
    if options.metric == "accuracy" and not data.has_classes:
        raise OptionError(
            f"--metric accuracy needs classes, int64 [N]; targets of {name} are {data.y_train.dtype}"
        )
    largest = max(options.batch_sizes, default=source_named(name).batch_size)
    if largest > len(data.x_train):
        raise OptionError(f"--batch-size {largest} is more than the {len(data.x_train)} training examples")
    return data


def _pool(options: StudyOptions, data: Mapping[str, Dataset], framework: Framework, display: Display) -> Pool:
    if options.scheduler is None:
        return WorkerPool(options.workers, data, framework, display)
    from .cluster import DaskPool

    return DaskPool(options.scheduler, options.jobs, data, framework, display)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps a second study out of a folder, which is made if it is not there, until this one ends or dies.

    Raises:
        StudyError: another one is at work there.
        FileError: the folder, or the lock's file in it, cannot be made.
    """
    with naming_the_extra("batchnorm.study"):  # here, so that the module imports without the extra
        from filelock import FileLock, Timeout

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
    def __init__(
        self,
        options: StudyOptions,
        data: Mapping[str, Dataset],
        framework: Framework,
        display: Display,
        pool: Pool,
    ) -> None:
        self.options, self.data, self.framework, self.display = options, data, framework, display
        self.pool = pool
        self.folder = options.folder
        self.runs_folder = options.folder / "runs"
        self.timing_folder = options.folder / "timing"
        self.fingerprints = {name: one.fingerprint() for name, one in data.items()}
        self.tasks = plan(options)

    def measure(self) -> tuple[dict[RunTask, Run], dict[Setting, Timing]]:
        """Does what is not on disk yet; returns all runs, and the timing of each setting."""
        for folder in (self.runs_folder, self.timing_folder):
            with naming(folder, "written"):
                folder.mkdir(exist_ok=True)
        stored = {task: self._stored(task) for task in self.tasks}
        runs = {task: run for task, run in stored.items() if run is not None}
        try:
            with self.pool as pool:
                timing = self._time(pool)
                self._train(pool, runs, timing)
        except KeyboardInterrupt:
            finished = sum(self._path(task).exists() for task in self.tasks)
            raise StudyInterrupted(finished, len(self.tasks), self.folder) from None
        return runs, timing

    def publish(self, runs: Mapping[RunTask, Run], timing: Mapping[Setting, Timing]) -> StudyResult:
        """Writes the results, curves and report of the runs that are there."""
        from .report import write_report

        found = [runs[task] for task in self.tasks if task in runs]
        results = json_safe(summarize(self.options, self.data, found, timing, self.framework))
        assert isinstance(results, dict)
        if len(found) < len(self.tasks):
            results["provenance"] |= {"runs_planned": len(self.tasks), "runs_finished": len(found)}
        write_json(self.folder / "results.json", results)
        write_whole(self.folder / "curves.csv", curves_csv(found))
        return StudyResult(self.folder, results, write_report(self.folder))

    def _settings_of(self, task: RunTask | TimingTask) -> dict[str, object]:
        name = task.setting.data
        return settings_of(task, self.data[name], self.fingerprints[name], self.framework)

    def _path(self, task: RunTask) -> Path:
        return self.runs_folder / f"{task.name}.json"

    def _stored(self, task: RunTask) -> Run | None:
        settings = self._settings_of(task)
        run = read_stored(self._path(task), settings, Run)
        return run if run is not None and run.answers(settings) else None

    def _time(self, pool: Pool) -> dict[Setting, Timing]:
        """Measures seconds per step while nothing else of ours runs, unless the same was measured before."""
        options, timings = self.options, dict[Setting, Timing]()
        missing: list[TimingTask] = []
        before: dict[Setting, dict[str, object] | None] = {}
        for setting in options.settings():
            arms = timed_with(options.arms_on(setting.data))
            task = TimingTask(setting, options.recipe(setting.data), arms)
            path, settings = self._timing_path(setting), self._settings_of(task)
            before[setting] = settings_at(path)
            if before[setting] == json_safe(settings):
                stored = read_stored(path, settings, Timing)
                if stored is not None and stored.answers(task.arms):
                    timings[setting] = stored
                    continue
            missing.append(task)
        if missing:
            self.display.stage("timing the arms, one step at a time")
        for task in missing:
            path = self._timing_path(task.setting)
            # One after the other: two at a time would slow each other down.
            for _, timing in pool.run([task]):
                if settings_at(path) != before[task.setting]:
                    raise StudyError(f"another study wrote {path} meanwhile: name another folder with --out")
                write_json(path, {"settings": self._settings_of(task), **vars(timing)})
                timings[task.setting] = timing
        return timings

    def _timing_path(self, setting: Setting) -> Path:
        return self.timing_folder / f"{setting.file_name}.json"

    def _train(self, pool: Pool, runs: dict[RunTask, Run], timing: Mapping[Setting, Timing]) -> None:
        """Does the runs that are missing, and store each when it is finished."""
        missing = [task for task in self.tasks if task not in runs]
        if not missing:
            return
        names = setting_names(self.options.settings())
        work = {task: self._work(task, timing[task.setting]) for task in missing}
        workers = min(pool.size, len(missing))
        self.display.training(len(self.tasks), len(runs), sum(work.values()), workers)
        per_step: dict[Task, float] = {task: work[task] / max(self._steps(task), 1) for task in missing}
        schedule = ReportSchedule()
        for task, run in pool.run(missing, per_step):
            assert isinstance(task, RunTask)
            self._stored(task)  # raises where another study's came meanwhile
            write_json(self._path(task), {"settings": self._settings_of(task), **vars(run)})
            runs[task] = run
            name = names[task.setting]
            self.display.run_ended(task.describe(), name, run)
            of_setting = [other for other in self.tasks if other.setting == task.setting]
            if all(other in runs for other in of_setting):
                found = [runs[other] for other in of_setting]
                self.display.setting_ended(
                    name, verdict_on(name, found, timing[task.setting], task.recipe.metric)
                )
            if len(runs) < len(self.tasks):
                so_far = schedule.write_if_due(lambda: self.publish(runs, timing))
                if so_far is not None:
                    self.display.published(so_far.report)

    def _work(self, task: RunTask, timing: Timing) -> float:
        """Returns about how many seconds a run takes: its steps, and evaluations between and after them."""
        arm, held_out = timing.arms[task.arm], len(self.data[task.setting.data].x_test)
        evaluations = 1.4 * task.recipe.epochs + 6
        return (
            self._steps(task) * median(arm.seconds_per_step)
            + evaluations * held_out / EVALUATION_BATCH * arm.seconds_per_prediction
        )

    def _steps(self, task: RunTask) -> int:
        per_epoch = len(self.data[task.setting.data].x_train) // task.setting.batch_size
        return task.recipe.epochs * per_epoch
