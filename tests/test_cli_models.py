"""`batchnorm inspect`, `convert`, `calibrate` and `fold` on a user's model and files."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model

import batchnorm
from batchnorm.cli.model_files import Run
from batchnorm.kernels import choose
from batchnorm.studies.data import load_data
from tests.support.commands import assert_fails, built, folder, run


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
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, of group test, is not there")
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
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, of group test, is not there")
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


def test_calibrate_leaves_padding_out(tmp_path: Path) -> None:
    """Row 18: data with lengths goes to the model as in a study, and statistics are those of valid frames."""
    (tmp_path / "speech.py").write_text(
        "import batchnorm\nfrom torch import nn\n\n\n"
        "class Speech(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.norm = batchnorm.BatchNorm1d(12)\n\n"
        "    def forward(self, x, lengths):\n        return self.norm(x.transpose(1, 2))\n"
    )
    out, spec = tmp_path / "new.safetensors", f"{tmp_path}/speech.py:Speech"
    done = run("calibrate", spec, "--data", "vowels", "--batch-size", 50, "--samples", 120, "--out", out)
    assert done.exit_code == 0, done.output
    vowels = load_data("vowels")
    assert vowels.lengths_train is not None
    valid = np.arange(vowels.x_train.shape[1]) < vowels.lengths_train[:120, None]
    frames = vowels.x_train[:120][valid].astype(np.float64)
    state = load_file(out)
    np.testing.assert_allclose(state["norm.running_mean"].numpy(), frames.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state["norm.running_var"].numpy(), frames.var(0, ddof=1), rtol=1e-4)
