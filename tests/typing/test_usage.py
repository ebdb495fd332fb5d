"""Type checkers find real types in ordinary use, and the errors in wrong use: pyright and mypy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import run_python

USAGE = Path(__file__).with_name("usage.py")
# A mistake on each line from the fourth on: were the type Any, there would be none.
WRONG = """# pyright: strict
import batchnorm, batchnorm.keras, torch
x, model = torch.ones(2, 3), torch.nn.Sequential()
a: int = batchnorm.BatchNorm1d(3)(x)
b: int = batchnorm.calibrate(model, [x])
c: int = batchnorm.inspect(model).rows[0]
d: torch.nn.Linear = batchnorm.freeze(model)
e: int = batchnorm.functional.moments(x).mean
batchnorm.BatchNorm1d(3, statistics="ghost")
batchnorm.calibrate(model, [x], method="layer-wise")
batchnorm.keras.Calibrate(x, when="never")
batchnorm.Ghost(sise=3)
"""
MISTAKES = list(range(4, 13))


def wrong(folder: Path) -> Path:
    path = folder / "wrong.py"
    path.write_text(WRONG)
    return path


def test_pyright(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*words, USAGE, wrong(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    found = json.loads(done.stdout)
    errors = [one for one in found["generalDiagnostics"] if one["severity"] == "error"]
    assert found["summary"]["filesAnalyzed"] == 2
    assert not [error for error in errors if not error["file"].endswith("wrong.py")]
    assert sorted({error["range"]["start"]["line"] + 1 for error in errors}) == MISTAKES, errors


@pytest.mark.slow
def test_mypy(tmp_path: Path) -> None:
    """Without a configuration, as by a user who has none; `make lint` checks the file by ours."""
    words = ["-m", "mypy", "--strict", "--config-file=", "--cache-dir", tmp_path, "--no-error-summary"]
    assert run_python(*words, USAGE) == ""
    done = subprocess.run(
        [sys.executable, *map(str, words), str(wrong(tmp_path))], capture_output=True, text=True, check=False
    )
    lines = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error: " in line}
    assert sorted(lines) == MISTAKES, done.stdout
