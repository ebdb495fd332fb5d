"""Runs example programs as a user does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def held_out_accuracy(program: Path) -> float:
    """Run the program in a process of its own and return the accuracy that it printed last, 0..1."""
    # One thread: tests run side by side, and threads that wait for each other's core take 20 times as long.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    printed = re.search(r"held-out accuracy: ([\d.]+)%\n\Z", done.stdout)
    assert printed, done.stdout
    return float(printed[1]) / 100
