"""Files that commands write: checked before the work, whole or not there, and no earlier file is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import batchnorm
from batchnorm.errors import FileError
from tests.support.commands import assert_fails, built, folder, run


def test_no_file_is_written_over_or_left_half(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = own.with_name("x.safetensors")
    out.write_text("mine")
    assert_fails(run("convert", f"{own}:net", "--out", out), 2, "is there already: --force")
    assert out.read_text() == "mine"
    assert_fails(run("convert", f"{own}:net", "--out", own.with_name("x.pt")), 2, "must end in .safetensors")
    done = run("convert", f"{own}:broken", "--out", own.parent / "no" / "x.safetensors")
    assert_fails(done, 1, "there is no folder")  # before the model is built

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", interrupted)
        done = run("convert", f"{own}:net", "--out", out, "--force")
    assert (done.exit_code, done.stderr) == (130, "stopped\n")
    assert out.read_text() == "mine"
    assert folder(own) == {"own.py", "x.safetensors"}
    assert run("convert", f"{own}:net", "--out", out, "--force").exit_code == 0
    assert load_file(out).keys() == built(own, "net").state_dict().keys()


def test_the_progress_stays_until_all_is_written(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, picture, note = (own.with_name(name) for name in ("x.safetensors", "x.svg", "note"))
    options = ("--data", f"{own}:data", "--batch-size", "7", "--resume", note, "--picture", picture)

    def full(*_: object) -> None:
        raise FileError("the disk is full")

    for write in ("cli.model_files", "studies.plots.canvas"):
        with monkeypatch.context() as patched:
            patched.setattr(f"batchnorm.{write}.write_whole", full)
            done = run("calibrate", f"{own}:net", *options, "--out", out, "--force")
        assert_fails(done, 1, "the disk is full")
        assert note.exists()
    with monkeypatch.context() as patched:
        patched.setattr("batchnorm.models.calibration.passes.run", full)  # no forward is run again
        done = run("calibrate", f"{own}:net", *options, "--out", out, "--force")
    assert done.exit_code == 0, done.output
    model = built(own, "net")
    batchnorm.calibrate(model, torch.from_numpy(built(own, "data")[0]).float().split(7))
    for name, value in load_file(out).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0)
    assert folder(own) == {"own.py", "x.safetensors", "x.svg"}


def test_destinations_are_tried_before_any_work(own: Path) -> None:
    """The model's function raises, if it is called."""
    good, bad = own.with_name("x.safetensors"), own.parent / "no"
    os.mkfifo(own.with_name("pipe.svg"))
    for options, code, part in (
        (("--out", bad / "x.safetensors"), 1, "there is no folder"),
        (("--out", good, "--picture", bad / "x.svg"), 1, "there is no folder"),
        (("--out", good, "--picture", own.with_name("pipe.svg")), 1, "it is no regular file"),
        (("--out", good, "--resume", bad / "note"), 1, "there is no folder"),
        (("--out", good, "--resume", good), 2, "is the name of another file of this command"),
        (("--out", good, "--resume", bad.parent / "w.pt"), 2, "is the name of another file of this command"),
    ):
        weights = ("--weights", own.with_name("w.pt"))
        done = run("calibrate", f"{own}:broken", "--data", f"{own}:data", *weights, *options, "--force")
        assert_fails(done, code, part)
    assert folder(own) == {"own.py", "pipe.svg"}


_FULL = """
import json, resource, signal, sys
from pathlib import Path
from typer.testing import CliRunner
from batchnorm.cli.commands import app

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
for command, suffix, *options in json.loads(sys.argv[1]):
    out = Path(f"x{suffix}")
    done = CliRunner().invoke(app, [command, "own.py:net", "--out", str(out), "--force", *options])
    print(json.dumps([done.exit_code, done.stderr.splitlines()[-1], out.read_text()]))
"""


def test_a_real_full_disk_is_one_line_and_the_earlier_file_stays(own: Path) -> None:
    """A limit on the size of files stands for the disk: the system refuses to write more than 64 bytes."""
    data = ["--data", "own.py:data"]
    calls = [
        ["convert", ".safetensors"],
        ["calibrate", ".safetensors", *data],
        ["calibrate", ".safetensors", *data, "--resume", "note"],
        ["calibrate", ".safetensors", *data, "--method", "layerwise", "--resume", "note"],
        ["fold", ".safetensors"],
        ["fold", ".pt2", "--input", "2x3x6x6"],
        ["fold", ".onnx", "--input", "2x3x6x6"],
    ]
    for suffix in (".safetensors", ".pt2", ".onnx"):
        own.with_name(f"x{suffix}").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FULL, json.dumps(calls)],
        cwd=own.parent,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "BATCHNORM_ENGINE": "eager",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for call, line in zip(calls, done.stdout.splitlines(), strict=True):
        code, said, content = json.loads(line)
        assert (code, content) == (1, "mine"), (call, said)
        assert said.startswith("error: "), call
        assert said.find("cannot be written: File too large") > 0, (call, said)
    assert folder(own) == {"own.py", "x.safetensors", "x.pt2", "x.onnx"}
