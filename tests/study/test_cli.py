"""The real command, in processes of its own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import batchnorm

from .own_code import write_own_code

# One thread for timing too: two threads on a busy machine wait for each other.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-c", "from batchnorm.cli import main; main()"]
# Seconds after which something hangs, however slow the machine.
PATIENCE = 600.0


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_own_code(tmp_path)


def tiny(own: Path, network: str = "net", *more: str) -> list[str]:
    """A command that trains twice; options in `more` win over those here."""
    places = ["--network", f"{own}:{network}", "--data", f"{own}:data"]
    sizes = ["--seeds", "1", "--epochs", "2", "--batch-size", "20", "--jobs", "1"]
    arms = ["--arms", "none,batchnorm", "--learning-rate", "1e-2"]
    return [*COMMAND, "study", *places, *sizes, *arms, *more]


def run(
    command: list[str], folder: Path, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        preexec_fn=before,
        check=False,
    )


def assert_fails_in_one_line(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    last = done.stderr.splitlines()[-1]
    assert done.returncode == code, done.stderr
    assert all(part in last for part in parts), done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def is_gone(group: int) -> bool:
    """Whether a process group has nothing alive; zombies are init's to bury."""
    states = subprocess.run(
        ["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return not any(line.split()[0] == str(group) and "Z" not in line.split()[1] for line in states)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Return once something is so, whose end no event announces."""
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end, "it never is"
        time.sleep(0.05)


def test_a_study_from_end_to_end_and_again(own: Path) -> None:
    done = run(tiny(own), own.parent)
    folder = own.parent / "runs" / "study-own.py-data-own.py-net"
    assert done.returncode == 0, done.stderr
    assert "batchnorm" in done.stdout
    assert f"report: {folder.relative_to(own.parent) / 'report.html'}" in done.stdout
    assert "2 training runs, 1 at a time" in done.stderr
    results = json.loads((folder / "results.json").read_text())
    assert results["arms"].keys() == {"none", "batchnorm"}
    assert (folder / "report.html").stat().st_size > 1000
    written = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    written |= {path: path.stat().st_mtime_ns for path in (folder / "timing").iterdir()}
    assert len(written) == 3

    again = run(tiny(own), own.parent)
    assert again.returncode == 0, again.stderr
    assert "training runs" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in written} == written


@contextlib.contextmanager
def slow_study(own: Path, *more: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start a study of 16 runs in a process group of its own, of which nothing is left after the block."""
    process = subprocess.Popen(
        tiny(own, "slow", "--seeds", "8", *more),
        cwd=own.parent,
        env={**ENVIRONMENT, **environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_stops_keeps_finished_runs_and_the_same_command_goes_on(own: Path) -> None:
    """It waits for no run: those that are going on would take an hour."""
    with slow_study(own, "--jobs", "2", HANG_AFTER="2") as process:
        wait_until((own.parent / "hangs").exists)
        kept = {path: path.stat().st_mtime_ns for path in own.parent.glob("runs/*/runs/*.json")}
        second = run(tiny(own, "slow", "--batch-size", "10"), own.parent)
        assert_fails_in_one_line(second, 1, "another study is at work in runs/study", "--out")
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE)  # until all that have stderr, the workers too, end
        wait_until(lambda: is_gone(process.pid))
    assert process.returncode == 130
    finished = len(list(own.parent.glob("runs/*/runs/*")))
    assert 2 <= len(kept) <= finished < 16
    assert stderr.splitlines()[-1].startswith(
        f"stopped: {finished} of 16 runs are finished and kept in runs/study"
    )
    assert "Traceback" not in stderr

    with slow_study(own, "--jobs", "1") as on:
        _, stderr = on.communicate(timeout=PATIENCE)
    assert on.returncode == 0, stderr
    assert f"16 training runs, of which {finished} are finished already" in stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(own: Path) -> None:
    """In the midst of a run, which would take a day."""
    with slow_study(own, "--epochs", "100000000") as process:
        wait_until((own.parent / "trains").exists)
        process.kill()
        process.communicate(timeout=PATIENCE)
        wait_until(lambda: is_gone(process.pid))


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (
            ["--arms", "none,bachnorm"],
            ["error: unknown arm 'bachnorm': known are none, batchnorm"],
        ),
        (["--network", "mpl"], ["error: unknown network 'mpl': known are mlp, deep, residual-mlp"]),
        (["--learning-rate", "1e-3,fast"], ["error: learning rate 'fast' is not a number"]),
        (["--jobs", "many"], ["error: --jobs 'many'"]),
    ],
)
def test_wrong_options_are_one_line(own: Path, more: list[str], parts: list[str]) -> None:
    assert_fails_in_one_line(run(tiny(own, "net", *more), own.parent), 2, *parts)
    assert not (own.parent / "runs").exists()


def test_a_network_that_raises_is_one_line(own: Path) -> None:
    parts = ["own.py:raises", "arm batchnorm", "RuntimeError: no such layer here (own.py, line "]
    assert_fails_in_one_line(run(tiny(own, "raises"), own.parent), 1, *parts)


def test_tracebacks_are_shown_on_request_only(own: Path) -> None:
    own.write_text("def data():\n    raise RuntimeError('no such file')\n")
    assert_fails_in_one_line(run(tiny(own), own.parent), 1, "RuntimeError: no such file (own.py, line 2)")
    debug = run(tiny(own, "net", "--debug"), own.parent)
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr
    assert "raise RuntimeError('no such file')" in debug.stderr


def test_a_folder_that_cannot_be_made_is_one_line(own: Path) -> None:
    done = run(tiny(own, "net", "--out", str(own / "below")), own.parent)
    assert_fails_in_one_line(done, 1, "error: ", "own.py", os.strerror(errno.ENOTDIR))


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_one_line_and_leaves_no_part_of_it(own: Path) -> None:
    def no_file_beyond_8_bytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))

    done = run(tiny(own), own.parent, no_file_beyond_8_bytes)
    assert_fails_in_one_line(done, 1, "error: ", os.strerror(errno.EFBIG), "every finished run is kept")
    assert sorted(path.name for path in own.parent.glob("runs/*/*")) == [".lock", "runs"]


FIRST_MOMENTS = {
    "typer": "study",
    "batchnorm.cli.errors": "study",
    "numpy": "study",
    "filelock": "study",
    "rich.progress": "study",
    "batchnorm.cli.model_files": "inspect a.b:c",
    "safetensors": "convert a.b:c --out a.safetensors",
    "torch": "calibrate a.b:c --out a.safetensors --data digits",
    "a": "fold a.b:c --out a.safetensors",  # the user's own
}


@pytest.mark.parametrize("when", FIRST_MOMENTS)
def test_ctrl_c_in_the_first_moments_is_one_line(tmp_path: Path, when: str) -> None:
    """When a module is looked for, of those that are imported one after the other."""
    press = (
        "import signal, sys\n"
        "class Finder:\n    def find_spec(self, name, *_):\n"
        f"        if name == {when!r}: signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    command = [sys.executable, "-c", press + COMMAND[-1], *FIRST_MOMENTS[when].split()]
    done = run(command, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_version_and_help() -> None:
    version = run([*COMMAND, "--version"], Path())
    assert version.stdout == f"batchnorm {batchnorm.__version__}\n"
    helped = run([*COMMAND, "study", "--help"], Path())
    assert helped.returncode == 0
    for option in ("--network", "--framework", "--data-dir", "--target-accuracy", "--jobs", "--debug"):
        assert option in helped.stdout


def test_help_does_not_wait_for_torch() -> None:
    code = "from batchnorm.cli.commands import app\napp(['study', '--help'], standalone_mode=False)\n"
    code = f"import sys\n{code}sys.exit('torch' in sys.modules)"
    done = run([sys.executable, "-c", code], Path())
    assert done.returncode == 0, done.stderr
