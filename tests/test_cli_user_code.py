"""A user's code that would end, fork or mislead the command that runs it: one line, and nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from batchnorm.cli.commands import app

_OWN = """
import os, sys
import numpy as np
from torch import nn


def data():
    return np.ones((8, 3, 4, 4)), np.arange(8) % 2, np.ones((8, 3, 4, 4)), np.arange(8) % 2


def net():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))


def exits():
    sys.exit(0)


def exits_with_words():
    sys.exit("all done")


def closes():
    raise GeneratorExit


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError


def unspeakable():
    raise Unspeakable


class Exits(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        if x is not None:
            sys.exit(0)
        return self.norm(x)


def forks():
    os.fork()
    return net()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "own.py"
    path.write_text(_OWN)
    monkeypatch.chdir(tmp_path)
    return path


def run(command: str, model: str, *more: str) -> Result:
    out = [] if command == "inspect" else ["--out", "a.safetensors"]
    data = ["--data", "own.py:data"] if command == "calibrate" and "--data" not in more else []
    return CliRunner().invoke(app, [command, model, *out, *data, *more])


def assert_told(done: Result, *parts: str) -> None:
    (line,) = done.stderr.splitlines()
    assert done.exit_code == 1, done.output
    assert line.startswith("error: "), line
    assert all(part in line for part in parts), line
    assert not Path("a.safetensors").exists()


VERBS = ("inspect", "convert", "calibrate", "fold")


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_that_ends_the_process_is_an_error_that_names_its_line(own: Path, verb: str) -> None:
    assert_told(run(verb, f"{own}:exits"), "building", "SystemExit: 0 (own.py, line ")
    shape = [] if verb == "calibrate" else ["--input", "2x3x4x4"]
    assert_told(run(verb, f"{own}:Exits", *shape), "running", "SystemExit: 0 (own.py, line ")


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("exits_with_words", ["SystemExit: all done (own.py, line "]),
        ("closes", ["GeneratorExit: no message (own.py, line "]),
        ("unspeakable", ["Unspeakable: no message (own.py, line "]),
    ],
)
def test_whatever_a_model_function_raises_is_one_line(own: Path, function: str, parts: list[str]) -> None:
    assert_told(run("inspect", f"{own}:{function}"), *parts)


@pytest.mark.usefixtures("own")
def test_data_and_modules_that_end_the_process_are_errors() -> None:
    assert_told(
        run("calibrate", "own.py:net", "--data", "own.py:exits"), "data own.py:exits", "SystemExit: 0"
    )
    for name, line in (("exits", "sys.exit(0)"), ("divides", "1 / 0"), ("stops", "raise ValueError(3)")):
        Path(f"{name}.py").write_text(f"import sys\n{line}\n")
        assert_told(run("inspect", f"{name}.py:net"), f"importing {name}.py:net", f"({name}.py, line 2)")
        Path(f"package_{name}").mkdir()
        Path(f"package_{name}/__init__.py").write_text(f"import sys\n{line}\n")
        done = run("inspect", f"package_{name}.net:net")
        assert done.exit_code in (1, 2), done.output
        assert "importing" in done.stderr or name == "stops", done.stderr
    Path("lazy.py").write_text("import sys\ndef __getattr__(name):\n    sys.exit(0)\n")
    assert_told(run("inspect", "lazy.py:net"), "importing lazy.py:net", "SystemExit: 0 (lazy.py, line 3)")


@pytest.mark.usefixtures("own")
def test_a_process_that_a_model_forks_does_not_do_the_work_twice() -> None:
    code = "from batchnorm.cli import main; main()"
    command = [sys.executable, "-c", code, "convert", "own.py:forks", "--out", "a.safetensors"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True
    )
    assert done.stdout.count("written: a.safetensors") == 1
    assert done.stderr.startswith("building own.py:forks: a process that it forked came back")
    assert done.stderr.count("\n") == 1
