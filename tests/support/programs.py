"""Runs Python in processes of its own: code, modules, and example programs as a user does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_python(*words: str | Path, cwd: Path | None = None, **environment: str | Path | None) -> str:
    """Run `python *words` in a process of its own, and return what it printed.

    Args:
        words: options and arguments, such as `"-c", code`.
        cwd: its working folder; None = this process's.
        environment: variables to set in place of this process's; None = without it.

    Raises:
        AssertionError: it failed, with its stderr.
        subprocess.TimeoutExpired: it takes more than ten minutes.
    """
    variables = os.environ | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={name: value for name, value in variables.items() if environment.get(name, "") is not None},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def held_out_accuracy(program: Path) -> float:
    """Run the program in a process of its own and return the accuracy that it printed last, 0..1."""
    # One thread: tests run side by side, and threads that wait for each other's core take 20 times as long.
    output = run_python(program, OMP_NUM_THREADS="1")
    printed = re.search(r"held-out accuracy: ([\d.]+)%\n\Z", output)
    assert printed, output
    return float(printed[1]) / 100
