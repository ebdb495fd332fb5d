"""One mutant's trial: its change in a copy of the repository, and the tests of its room until one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from .rooms import Room, Run
from .sample import Mutant

SURVIVED = "survived"
# What pytest returns where no test failed by itself (its ExitCode).
_CODES = {2: "collection fails", 3: "pytest fails", 4: "conftest fails"}
_NO_TESTS = 5


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of some tests: the failure or SURVIVED, and the seconds that they took."""

    by: str
    seconds: float
    output: str = ""

    @property
    def is_caught(self) -> bool:
        """Return whether any test failed."""
        return self.by != SURVIVED


def copy(root: Path, folder: Path) -> Path:
    """Return a copy of the repository, times of files included: by these Numba knows what it has compiled."""
    to = folder / "copy"
    shutil.copytree(root, to, ignore=shutil.ignore_patterns(".*", "build", "runs", "dist"))
    return to


def mutate(mutant: Mutant | None, root: Path, place: Path) -> None:
    """Let a copy's sources be the repository's again, with what is compiled of them, but for a mutant."""
    shutil.rmtree(place / "src")
    shutil.copytree(root / "src", place / "src")
    if mutant is not None:
        path = place / mutant.file
        path.write_text(mutant.change.apply(path.read_text()))


def run_room(room: Room, file: Path | None, place: Path, limit: float, stop: threading.Event) -> Outcome:
    """Return the first failure of a room's tests in a copy.

    Args:
        room: whose tests.
        file: that was mutated, if any.
        place: the copy.
        limit: seconds, after which they have failed.
        stop: ends them, without a result.
    """
    begun = time.monotonic()
    for run in filter(lambda run: run.tries(file), room.runs):
        by, output = _pytest(run, place, begun + limit, stop)
        if by != SURVIVED:
            return Outcome(by, time.monotonic() - begun, output)
    return Outcome(SURVIVED, time.monotonic() - begun)


def _pytest(run: Run, place: Path, end: float, stop: threading.Event) -> tuple[str, str]:
    options = ["-x", "-q", "-n", "0", "-r", "fE", "--tb=line", "--color=no", "-p", "no:cacheprovider"]
    choice = ["-k", run.choice] if run.choice else []
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "KERAS_"))}
    ours = {"PYTHONPATH": str(place / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    if run.backend:
        ours["KERAS_BACKEND"] = run.backend
        if run.backend != "torch":  # beside what pyproject.toml leaves out, which this replaces
            choice += ["-m", "not one_backend and not slow"]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *choice, *run.tests],
            cwd=place,
            env=kept | ours,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = None
        try:
            while code is None and time.monotonic() < end and not stop.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(1.0)
        finally:  # processes that a failed test has left, too
            _end(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return verdict(code, text), text


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def verdict(code: int | None, output: str) -> str:
    """Return what failed, by pytest's exit status and what it printed; None is a timeout."""
    if code is None:
        return "timeout"
    if code == 0:
        return SURVIVED
    if code == _NO_TESTS:
        raise ValueError(f"pytest found no tests:\n{output[-2000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, re.MULTILINE)
    what = _CODES.get(code, "" if code > 0 else f"crash, by {signal.Signals(-code).name}")
    return ": ".join(filter(None, (what, failed[1] if failed else ""))) or f"exit status {code}"
