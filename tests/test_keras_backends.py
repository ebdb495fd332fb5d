"""tests/keras on the other backends: Keras has one per process, so each is a run of its own, beside ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_the_tests_of_keras_pass_on(backend: str) -> None:
    """A failure shows what that run printed."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-m", "not one_backend", "--color=no", "tests/keras"],
        cwd=ROOT,
        env=ours | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, done.stderr)
    status = done.returncode
    assert status == 0, f"KERAS_BACKEND={backend} pytest tests/keras failed"
