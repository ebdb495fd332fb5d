"""`batchnorm env`: the report of an installation, a whole one, a broken one, and one without Typer."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import batchnorm
from batchnorm.cli import environment
from batchnorm.cli.commands import app
from tests.support.programs import run_python

_RUN = "from batchnorm.cli import main; main()"
_WITHOUT = """
import sys

class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {"typer", "rich", "matplotlib", "filelock", "numba"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in {"typer", "numba"} else found(name, *more)
"""


def test_table_and_json_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    told = CliRunner().invoke(app, ["env"])
    assert told.exit_code == 0, told.output
    found = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert found["packages"]["batchnorm"] == batchnorm.__version__
    assert found["packages"]["torch"] == importlib.metadata.version("torch")  # without "+cu130"
    assert found["torch"]["build"] == torch.__version__
    assert found["torch"]["engine"].startswith(batchnorm.kernels.explain(torch.zeros(2, 1)))
    assert found["torch"]["threads"] == str(torch.get_num_threads())
    assert found["torch"]["kernels on disk"] == str(batchnorm.kernels.cache_folder())
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    lines = told.stdout.splitlines()
    values = [(name, value) for part in found.values() for name, value in part.items()]
    assert len(lines) == len(values)
    assert all(
        name in line and line.endswith(value) for line, (name, value) in zip(lines, values, strict=True)
    )


def test_errors_are_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise OSError("libcudart.so:\ncannot open")

    monkeypatch.setattr(torch, "get_num_threads", broken)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = environment.environment()
    assert found["torch"]["threads"] == "OSError: libcudart.so: cannot open"
    assert found["torch"]["devices"] == "cpu; built for CUDA: no"


def test_without_typer() -> None:
    """A user of the extra `torch` or `keras` alone has no Typer, and reports a bug all the same."""
    run = f"{_WITHOUT}\nimport sys\nsys.argv = ['batchnorm', *sys.argv[1:]]\n{_RUN}"
    found = json.loads(run_python("-c", run, "env", "--json"))
    assert "pip install numba" in found["torch"]["engine"]
    assert "pip install 'batchnorm[torch]'" in found["torch"]["kernels on disk"]
    assert found["keras"]["backend"] in {"torch", "jax", "tensorflow"}
    assert run_python("-c", run, "--version") == f"batchnorm {batchnorm.__version__}\n"
    done = subprocess.run([sys.executable, "-c", run, "study"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the commands but `env` need typer, which is not installed")


def test_the_folder_of_kernels_is_theirs(tmp_path: Path) -> None:
    """Numba puts a compiled kernel where `cache_folder` says, by default and in a folder of the user's."""
    code = (
        "import torch, batchnorm\n"
        "batchnorm.functional.moments(torch.ones(4, 2))\n"
        "folder = batchnorm.kernels.cache_folder()\n"
        "print(folder, *sorted({path.suffix for path in folder.glob('*.nb*')}))\n"
    )
    source = Path(batchnorm.__file__).parent / "kernels" / "cpu"
    assert run_python("-c", code, NUMBA_CACHE_DIR=None).startswith(str(source / "__pycache__"))
    told = run_python("-c", code, NUMBA_CACHE_DIR=tmp_path).split()
    assert Path(told[0]).is_relative_to(tmp_path)
    assert told[1:] == [".nbc", ".nbi"]
