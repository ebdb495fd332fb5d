"""`batchnorm inspect`, `convert`, `calibrate` and `fold` on a user's model and files."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from typer.testing import CliRunner

import batchnorm
from batchnorm.cli import app
from batchnorm.cli.model_files import Run
from batchnorm.errors import FileError
from batchnorm.kernels import choose

_OWN = """
import numpy as np
import torch
from torch import nn


def data():
    random = np.random.default_rng(0)
    x, y = 3 + 2 * random.standard_normal((60, 3, 6, 6)), np.arange(60) % 3
    return x[:40], y[:40], x[40:], y[40:]


def flat():
    x, *rest = data()
    return x.reshape(40, -1), rest[0], rest[1].reshape(20, -1), rest[2]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())


def tied():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[3].weight = model[1].weight
    return model


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(3), nn.SiLU()

    def forward(self, x):
        return self.act(self.norm(x)) if x.sum() < 1e9 else x


class Special(nn.BatchNorm2d):
    pass


def special():
    return nn.Sequential(Special(3))


class Raising(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        raise RuntimeError("no such road")


def number():
    return 3


def broken():
    raise RuntimeError("nothing here")
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(_OWN)
    return path


def run(command: str, model: str, *options: object) -> Result:
    return CliRunner().invoke(app, [command, model, *map(str, options)])


def assert_fails(done: Result, code: int, *parts: str) -> None:
    line = done.stderr.splitlines()[-1]
    assert done.exit_code == code, done.output
    assert line.startswith("error: "), done.stderr
    assert all(part in line for part in parts), line
    assert "Traceback" not in done.output


def folder(own: Path) -> set[str]:
    return {path.name for path in own.parent.iterdir()} - {"__pycache__"}


def built(own: Path, function: str) -> nn.Module:
    scope: dict[str, object] = {}
    exec(compile(own.read_text(), str(own), "exec"), scope)
    return scope[function]()


def test_the_real_command_calibrates_and_the_state_fits(own: Path) -> None:
    """Row 1: weights in, statistics of all the data out."""
    torch.save(built(own, "net").state_dict(), own.with_name("w.pt"))
    options = ["--weights", "w.pt", "--data", "own.py:data", "--batch-size", "7", "--out", "new.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", "from batchnorm.cli import main; main()", "calibrate", "own:net", *options],
        cwd=own.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Calibrated 2 layers on 40 samples in 6 batches." in done.stdout
    assert "written: new.safetensors" in done.stdout
    model = built(own, "net")
    load_model(model, own.with_name("new.safetensors"))
    scope: dict[str, object] = {}
    exec(own.read_text(), scope)
    x = scope["data"]()[0].astype(np.float32)
    np.testing.assert_allclose(model[0].running_mean.numpy(), x.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(model[0].running_var.numpy(), x.var((0, 2, 3), ddof=1), rtol=1e-5)
    mode = own.with_name("new.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == stat.S_IMODE(own.stat().st_mode)  # as any file that this user makes
    assert folder(own) == {"own.py", "w.pt", "new.safetensors"}


def test_inspect_prints_the_table(own: Path) -> None:
    for options in ([], ["--input", "4x3x6x6"], ["--data", f"{own}:data"]):
        done = run("inspect", f"{own}:net", *options)
        assert done.exit_code == 0, done.output
        expected = str(batchnorm.inspect(built(own, "net")))
        assert done.stdout.strip() == expected.strip()
    assert "never updated" in done.stdout
    assert "relu" in done.stdout
    for options in (["--input", "4x3x6x6"], ["--data", f"{own}:data"]):
        done = run("inspect", f"{own}:Branching", *options)
        assert "silu (as on the example)" in done.stdout, done.output
    assert folder(own) == {"own.py"}


def test_samples_and_input_shape_choose_the_data(own: Path) -> None:
    out = own.with_name("s.safetensors")
    done = run("calibrate", f"{own}:net", "--data", f"{own}:flat", "--input", "1x3x6x6", "--samples", 9,
               "--batch-size", 4, "--out", out)  # fmt: skip
    assert "on 9 samples in 3 batches" in done.stdout, done.output
    assert load_file(out)["0.running_mean"].mean() > 2
    done = run(
        "calibrate", f"{own}:net", "--data", f"{own}:flat", "--input", "1x5x6x6", "--out", out, "--force"
    )
    assert_fails(done, 2, "has shape [108], which is no [5, 6, 6]")


def test_convert_fills_and_shared_tensors_stay_shared(own: Path) -> None:
    out = own.with_name("t.safetensors")
    done = run("convert", f"{own}:tied", "--input", "5x4", "--out", out)
    assert "2 of 2 batch normalizations are layers of batchnorm now, which give the same" in done.stdout
    model = batchnorm.convert(built(own, "tied"))
    load_model(model, out)
    assert model[3].weight is model[1].weight
    assert len(load_file(out)) == len(model.state_dict()) - 1


def test_warnings_are_lines(own: Path) -> None:
    own.write_text(own.read_text() + "\n\ndef single():\n    return nn.BatchNorm1d(3)\n")
    done = run("convert", f"{own}:single", "--input", "1x3", "--out", own.with_name("x.safetensors"))
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("warning: convert: ")
    assert "in training" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "1 of 1 batch normalizations are layers of batchnorm now" in done.stdout


class Malicious:
    """A checkpoint that makes a file as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_checkpoint_that_would_run_code_is_refused(own: Path) -> None:
    ran = own.with_name("it-ran")
    weights = own.with_name("bad.pt")
    torch.save({"state_dict": built(own, "net").state_dict(), "extra": Malicious(ran)}, weights)
    done = run("inspect", f"{own}:net", "--weights", weights)
    assert_fails(done, 1, "bad.pt is not read", "might run code")
    assert not ran.exists()
    torch.load(weights, weights_only=False)  # it would have run
    assert ran.exists()


def test_weights_of_every_form_and_wrong_ones(own: Path) -> None:
    state = built(own, "net").state_dict()
    state["2.weight"] = torch.zeros(4)
    plain, nested, tensors = (own.with_name(name) for name in ("plain.pth", "nested.ckpt", "w.safetensors"))
    torch.save(state, plain)
    torch.save({"state_dict": state, "epoch": 3}, nested)
    save_file(state, tensors)
    for weights in (plain, nested, tensors):
        done = run("inspect", f"{own}:net", "--weights", weights)
        assert "dead weight (4 of 4)" in done.stdout, done.output
    wrong = own.with_name("wrong.pt")
    for content, parts in (
        ({"0.weight": torch.ones(3)}, ["wrong.pt", "Missing key"]),
        ({"epoch": 3}, ["wrong.pt holds no state"]),
        ([torch.ones(3)], ["wrong.pt holds no state"]),
    ):
        torch.save(content, wrong)
        assert_fails(run("inspect", f"{own}:net", "--weights", wrong), 1, *parts)
    save_file({"0.weight": torch.ones(3)}, own.with_name("few.safetensors"))
    done = run("inspect", f"{own}:net", "--weights", own.with_name("few.safetensors"))
    assert_fails(done, 1, "few.safetensors", "Missing key")
    for name in ("text.safetensors", "text.pt"):
        own.with_name(name).write_text("no weights at all, only words")
        assert_fails(run("inspect", f"{own}:net", "--weights", own.with_name(name)), 1, name)
        done = run("inspect", f"{own}:net", "--weights", own.with_name(f"no-{name}"))
        assert_fails(done, 1, f"no-{name}", "No such file")


@pytest.mark.parametrize(
    ("function", "options", "code", "parts"),
    [
        ("absent", [], 2, ["has no function 'absent'"]),
        ("number", [], 2, ["returned a int, not a torch.nn.Module"]),
        ("broken", [], 1, ["RuntimeError: nothing here (own.py, line "]),
        ("special", [], 2, ["0 (", "Special): a subclass"]),
        ("Raising", ["--input", "2x3x4x4"], 1, ["RuntimeError: no such road (own.py, line "]),
        ("net", ["--input", "3xx"], 2, ["--input '3xx' is no shape"]),
        ("net", ["--data", "digit"], 1, ["unknown data 'digit'"]),
        ("net", ["--batch-size", "0"], 2, ["--batch-size 0 is below 1"]),
        ("net", ["--input", "2x7x4x4"], 1, ["running ", "should contain 7 elements"]),
    ],
)  # fmt: skip
def test_what_a_user_does_wrong_is_one_line(
    own: Path, function: str, options: list[str], code: int, parts: list[str]
) -> None:
    done = run("convert", f"{own}:{function}", "--out", own.with_name("x.safetensors"), *options)
    assert_fails(done, code, *parts)
    assert folder(own) == {"own.py"}


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_exported_models_run_without_the_users_code(own: Path, suffix: str) -> None:
    """Row 29: in evaluation, whatever mode the model was in, and for any number of examples."""
    job = Run(f"{own}:plain", None, None, None, None, 4, "4x3x6x6")
    out, x = own.with_name(f"x{suffix}"), torch.randn(3, 3, 6, 6)
    job.write(job.model, out, False, job.example(needed=True))
    expected = built(own, "plain").eval()(x)
    if suffix == ".pt2":
        found = torch.export.load(out).module()(x)
    else:
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, of the extra dev, is not there")
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert folder(own) == {"own.py", f"x{suffix}"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("suffix", [".pt2", ".onnx", ".safetensors"])
def test_fold_writes_a_model_to_run(own: Path, suffix: str) -> None:
    out, x = own.with_name(f"x{suffix}"), torch.randn(3, 3, 6, 6)
    done = run("fold", f"{own}:net", "--input", "4x3x6x6", "--out", out)
    assert done.exit_code == 0, done.output
    assert "of 2 batch normalizations folded" in done.stdout
    expected = built(own, "net").eval()(x)
    if suffix == ".pt2":
        found = torch.export.load(out).module()(x)
    elif suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, of the extra dev, is not there")
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        folded = batchnorm.fold(built(own, "net").eval())
        load_model(folded, out)
        found = folded.eval()(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_calibrate_layerwise_draws_and_leaves_no_progress_file(own: Path) -> None:
    out, picture, note = (own.with_name(name) for name in ("x.safetensors", "x.svg", "note"))
    options = ("--data", f"{own}:data", "--batch-size", "7", "--method", "layerwise", "--resume", note)
    done = run("calibrate", f"{own}:net", *options, "--picture", picture, "--out", out)
    assert done.exit_code == 0, done.output
    model = built(own, "net")
    x = torch.from_numpy(built(own, "data")[0]).float()
    batchnorm.calibrate(model, [x], method="layerwise")
    found = load_file(out)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    assert "<svg" in picture.read_text(encoding="utf-8")
    assert folder(own) == {"own.py", "x.safetensors", "x.svg"}


def test_the_progress_stays_until_all_is_written(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, picture, note = (own.with_name(name) for name in ("x.safetensors", "x.svg", "note"))
    options = ("--data", f"{own}:data", "--batch-size", "7", "--resume", note, "--picture", picture)

    def full(*_: object) -> None:
        raise FileError("the disk is full")

    for write in ("cli.model_files", "study.plots.canvas"):
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
from batchnorm.cli import app

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


def test_calibrate_refuses_another_method_and_picture(own: Path) -> None:
    options = ("--data", f"{own}:data", "--out", own.with_name("x.safetensors"))
    assert_fails(run("calibrate", f"{own}:net", *options, "--method", "guess"), 2, "method", "'guess'")
    done = run("calibrate", f"{own}:net", *options, "--picture", own.with_name("x.png"))
    assert_fails(done, 2, "--picture", "x.png", ".svg")
    assert folder(own) == {"own.py"}


def test_an_exported_program_does_not_hold_the_data(own: Path) -> None:
    text = own.read_text().replace("(60, 3, 6, 6)", "(9000, 3, 6, 6)").replace("[:40]", "[:8980]")
    own.write_text(text.replace("[40:]", "[8980:]").replace("arange(60)", "arange(9000)"))
    out = own.with_name("x.pt2")
    done = run("fold", f"{own}:net", "--data", f"{own}:data", "--out", out)
    assert done.exit_code == 0, done.output
    assert out.stat().st_size < 1_000_000  # the data are 3.9 MB


def test_an_onnx_file_needs_packages_which_are_named(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.cli.model_files.find_spec", lambda _: None)
    done = run("fold", f"{own}:net", "--input", "4x3x6x6", "--out", own.with_name("x.onnx"))
    assert_fails(done, 2, "pip install onnx onnxscript")
    assert folder(own) == {"own.py"}


@pytest.mark.parametrize("command", ["convert", "calibrate"])
def test_an_engine_that_is_none_is_one_line(command: str, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choose.ENVIRONMENT_VARIABLE, "nonsense")
    choose._environment.cache_clear()
    try:
        options = ["--data", f"{own}:data", "--out", own.with_name("new.safetensors")]
        done = run(command, f"{own}:net", *options)
    finally:
        monkeypatch.undo()
        choose._environment.cache_clear()
    assert_fails(done, 1 if command == "convert" else 2, "BATCHNORM_ENGINE asks for the engine 'nonsense'")
    assert folder(own) == {"own.py"}
