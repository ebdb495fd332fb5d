"""Runs the experiments of claims: measures what is missing, stores each seed, and writes the report."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock, Timeout

import batchnorm
from batchnorm.errors import OptionError
from batchnorm.files import naming
from batchnorm.studies.errors import StudyError, StudyInterrupted
from batchnorm.studies.json_files import json_safe, read_stored, write_json
from batchnorm.studies.schedule import ReportSchedule
from batchnorm.studies.settings import slug

from . import fitting, networks
from .claim import Claim, Findings, Record, Report
from .registry import CLAIMS
from .summary import summarize

_FORMAT = 1  # of a seed's record


@dataclass(frozen=True)
class ClaimsOptions:
    """Which claims to test, and how often.

    Attributes:
        names: of claims, or their numbers; none = all.
        seeds: runs of each experiment with other initial weights and orders; a verdict takes 5 or more.
        out: the folder of the records and the report, where a second call goes on.

    Raises:
        OptionError: a name that is none of the claims', or no seed.
    """

    names: tuple[str, ...] = ()
    seeds: int = 5
    out: Path = Path("runs/claims")

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= 1000:
            raise OptionError(f"--seeds {self.seeds} is not between 1 and 1000")
        known = {claim.name for claim in CLAIMS} | {str(claim.number) for claim in CLAIMS}
        for name in self.names:
            if name not in known:
                raise OptionError(
                    f"unknown claim {name!r}: batchnorm claims --list names those that there are"
                )

    def claims(self) -> tuple[Claim, ...]:
        """Returns the claims that are asked for, in their order."""
        return tuple(
            claim
            for claim in CLAIMS
            if not self.names or claim.name in self.names or str(claim.number) in self.names
        )


@dataclass(frozen=True)
class ClaimsResult:
    """The files of a run.

    Attributes:
        folder: everything is below it.
        results: the content of `claims.json`.
        report: the page that shows it.
    """

    folder: Path
    results: dict[str, Any]
    report: Path

    def _repr_html_(self) -> str:
        """Shows the report within a notebook."""
        from batchnorm.studies.html_page import frame

        return frame(self.report)


class Progress:
    """Hears how far the experiments are, and shows nothing; terminal.py shows it."""

    def begin(self, seconds: float, experiments: int, finished: int) -> None:
        """Work begins that takes about so many seconds on one core."""

    def advance(self, claim: Claim, seed: int, seconds: float) -> None:
        """Of the work, about so many seconds are done, since the last call."""

    def ended(self, claim: Claim, seed: int) -> None:
        """A seed of an experiment is measured and stored."""


def run_claims(options: ClaimsOptions, progress: Progress | None = None) -> ClaimsResult:
    """Tests claims of the literature about batch normalization, and writes what came out.

    Files: `records/*.json` (a claim and seed each), `claims.json` and `report.html` below `options.out`.
    Each is
    written whole or not at all. What is there already is not measured again if it was measured by the same
    code
    and versions. On one thread; the caller's random state and threads are as before.

    Example:
        >>> run_claims(ClaimsOptions(names=("exploding-gradients",))).report

    Raises:
        DataError: a record in the folder was measured by other code or versions.
        StudyError: another run is at work in the folder.
        StudyInterrupted: Ctrl-C; every seed that was finished is kept.
        FileError: a file could not be read or written.
    """
    progress = progress or Progress()
    claims = options.claims()
    folder = options.out / "records"
    with naming(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(options.out):
        return _publish(options.out, _measure(claims, options, folder, progress))


def _publish(folder: Path, records: Mapping[Claim, list[Record]], missing: int = 0) -> ClaimsResult:
    from .report import write_report

    results = json_safe(summarize(records))
    assert isinstance(results, dict)
    write_json(folder / "claims.json", results)
    return ClaimsResult(folder, results, write_report(folder, records, missing))


def finished(options: ClaimsOptions) -> tuple[str, ...]:
    """Returns the names of the claims whose seeds are all on disk, measured by this code.

    Raises:
        DataError: a record in the folder was measured by other code or versions.
        FileError: a file could not be read.
    """
    folder = options.out / "records"
    return tuple(
        claim.name
        for claim in options.claims()
        if all(_stored(folder, claim, seed) is not None for seed in range(options.seeds))
    )


def _stored(folder: Path, claim: Claim, seed: int) -> Record | None:
    return read_stored(_path(folder, claim, seed), _settings(claim, seed), Record)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StudyError(f"another run is at work in {folder}: name another folder with --out") from None
    try:
        yield
    finally:
        lock.release()


def _measure(
    claims: Sequence[Claim], options: ClaimsOptions, folder: Path, progress: Progress
) -> dict[Claim, list[Record]]:
    """Does what is not on disk, one seed of all claims after the other; returns all records by claim."""
    tasks = [(claim, seed) for seed in range(options.seeds) for claim in claims]
    found: dict[tuple[str, int], Record] = {}
    for claim, seed in tasks:
        stored = _stored(folder, claim, seed)
        if stored is not None:
            found[claim.name, seed] = stored
    missing = [(claim, seed) for claim, seed in tasks if (claim.name, seed) not in found]
    progress.begin(sum(claim.seconds for claim, _ in missing), len(tasks), len(found))
    schedule = ReportSchedule()
    try:
        with _one_thread():
            for claim, seed in missing:
                record = _record(claim, seed, progress)
                write_json(_path(folder, claim, seed), {"settings": _settings(claim, seed), **vars(record)})
                found[claim.name, seed] = record
                progress.ended(claim, seed)
                if left := len(tasks) - len(found):
                    so_far = _by_claim(claims, options, found)
                    schedule.write_if_due(functools.partial(_publish, options.out, so_far, left))
    except KeyboardInterrupt:
        raise StudyInterrupted(len(found), len(tasks), folder) from None
    return _by_claim(claims, options, found)


def _by_claim(
    claims: Sequence[Claim], options: ClaimsOptions, found: Mapping[tuple[str, int], Record]
) -> dict[Claim, list[Record]]:
    """Returns the records that are there, of each claim that has one."""
    records = {
        claim: [found[claim.name, seed] for seed in range(options.seeds) if (claim.name, seed) in found]
        for claim in claims
    }
    return {claim: of_claim for claim, of_claim in records.items() if of_claim}


def _record(claim: Claim, seed: int, progress: Progress) -> Record:
    began, done = time.perf_counter(), 0.0

    def report(fraction: float) -> None:
        nonlocal done
        progress.advance(claim, seed, claim.seconds * (fraction - done))
        done = fraction

    findings = measure(claim, seed, report)
    report(1.0)
    return Record(findings.numbers, findings.curves, findings.grids, time.perf_counter() - began)


def measure(claim: Claim, seed: int, report: Report = lambda _: None) -> Findings:
    """Returns what a claim's experiment finds with a seed; torch's random state is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return claim.experiment(seed, report)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _path(folder: Path, claim: Claim, seed: int) -> Path:
    return folder / f"{slug(claim.name)}-{seed}.json"


@functools.cache
def _code_of(module: ModuleType) -> str:
    """Returns the code of a module without imports, comments, docstrings, annotations and layout."""
    tree = ast.parse(inspect.getsource(module))
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
        if hasattr(node, "annotation"):
            node.annotation = ast.Constant(None)
        if isinstance(node, ast.FunctionDef):
            node.returns = None
    return ast.dump(tree)


def _settings(claim: Claim, seed: int) -> dict[str, object]:
    """Returns all that decides what an experiment finds."""
    sources = [module for module in (inspect.getmodule(claim.experiment), fitting, networks) if module]
    digest = hashlib.sha256("".join(map(_code_of, sources)).encode())
    return {
        "format": _FORMAT,
        "claim": claim.name,
        "seed": seed,
        "experiment": digest.hexdigest()[:16],
        "batchnorm": batchnorm.__version__,
        "torch": torch.__version__,
    }
