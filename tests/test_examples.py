"""examples/ for PyTorch runs and learns; tests/keras has the one for Keras."""

from __future__ import annotations

import copy
import re
import runpy
from pathlib import Path

import pytest
import torch

import batchnorm

from .support.programs import EXAMPLES, held_out_accuracy, run_python


def test_torch_digits() -> None:
    assert held_out_accuracy(EXAMPLES / "torch_digits.py") > 0.85


def test_torch_monitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = runpy.run_path(str(EXAMPLES / "torch_monitor.py"))
    told = re.findall(r"step (\d+): the running mean is ([\d.]+) off", capsys.readouterr().out)
    assert [step for step, _ in told] == ["0", "25", "50", "75", "100", "125"]
    distances = [float(distance) for _, distance in told]
    assert distances[0] > 0.5 > max(distances[1:])  # the running mean begins at 0
    assert ran["accuracy"] > 0.85


def test_federated_statistics_are_those_of_the_pooled_data() -> None:
    """Pain row 40: of uneven clients, exactly; an average over clients by their size is far off."""
    ran = runpy.run_path(str(EXAMPLES / "torch_federated.py"))
    pooled = copy.deepcopy(ran["model"])
    batchnorm.calibrate(pooled, [ran["x"]])
    norm, wanted = ran["model"][1], pooled[1]
    torch.testing.assert_close(norm.running_mean, wanted.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, wanted.running_var, rtol=1e-5, atol=0)
    averaged = sum(net[1].running_var * len(part) / len(ran["x"]) for net, part in ran["clients"])
    assert ((averaged / wanted.running_var - 1).abs() > 0.01).any()
    assert (ran["found"] == ran["digits"].y_test).mean() > 0.7


def test_examples_are_short() -> None:
    for program in EXAMPLES.glob("*.py"):
        assert len(program.read_text(encoding="utf-8").splitlines()) <= 30, program.name


def test_digits_need_no_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'keras', 'typer', 'rich', 'matplotlib', 'jinja2'):\n"
        "    sys.modules[name] = None\n"
        "from batchnorm.studies.data import load_digits\n"
        "assert load_digits().x_train.shape == (2500, 28, 28)\n"
    )
    run_python("-c", code)
