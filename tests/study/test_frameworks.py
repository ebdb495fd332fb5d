"""The framework that a study takes, and its message where that is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchnorm.errors import MissingExtraError, OptionError
from batchnorm.studies import StudyOptions, run_study
from batchnorm.studies.frameworks import Framework, find_framework, framework_in_words, keras_backend
from batchnorm.studies.report import write_report
from batchnorm.studies.tasks import plan, settings_of
from batchnorm.studies.terminal import print_results
from tests.study.own_code import write_own_code
from tests.study.results_fixture import record, results, write


@pytest.fixture
def nobody_chose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Neither the environment nor a configuration names a backend; the folder for one that does."""
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    return tmp_path


def test_a_missing_framework_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(MissingExtraError, match=r"framework keras needs keras.*batchnorm\[keras\]"):
        run_study(StudyOptions(framework="keras"))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"batchnorm study needs torch.*batchnorm\[study\]"):
        run_study(StudyOptions())


def test_a_missing_backend_says_who_chose_it_and_what_to_do(
    nobody_chose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(
        OptionError,
        match=r"no KERAS_BACKEND is set and Keras's default is tensorflow, which is not installed: "
        r"pip install tensorflow, or set KERAS_BACKEND to one that is: jax, torch$",
    ):
        find_framework("keras")
    monkeypatch.setitem(sys.modules, "jax", None)
    configuration = nobody_chose / "keras.json"
    configuration.write_text('{"backend": "jax"}')
    with pytest.raises(OptionError, match=r"keras.json names jax, which is not .* that is: torch$"):
        find_framework("keras")
    monkeypatch.setenv("KERAS_BACKEND", "openvino")  # the environment comes first
    with pytest.raises(OptionError, match=r"KERAS_BACKEND names openvino, which trains nothing: .*jax"):
        find_framework("keras")


@pytest.mark.parametrize("broken", ["{", "[]", '{"backend": 3}', '{"backend": ""}'])
def test_a_configuration_that_names_no_backend_leaves_the_default(nobody_chose: Path, broken: str) -> None:
    assert keras_backend() == "tensorflow"
    (nobody_chose / "keras.json").write_text(broken)
    assert keras_backend() == "tensorflow"


def test_the_backend_is_the_one_that_keras_takes_and_is_found_without_importing_it(
    nobody_chose: Path,
) -> None:
    (nobody_chose / "keras.json").write_text('{"backend": "jax"}')
    code = (
        "import sys\n"
        "from batchnorm.studies.frameworks import find_framework\n"
        "found = find_framework('keras')\n"
        "assert not {'keras', 'torch', 'tensorflow', 'jax'} & set(sys.modules)\n"
        "import keras\n"
        "print(found.backend, keras.config.backend(), dict(found.versions)['keras'] == keras.__version__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["jax", "jax", "True"], done.stderr


@pytest.mark.usefixtures("nobody_chose")
def test_folders_and_stored_runs_tell_frameworks_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    keras = StudyOptions(networks=("mlp",), data=("digits",), framework="keras")
    assert keras.folder == Path("runs/study-keras-tensorflow-digits-mlp")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert keras.folder == Path("runs/study-keras-jax-digits-mlp")
    assert keras.command().startswith("KERAS_BACKEND=jax batchnorm study --framework keras --data digits ")
    assert "framework" not in StudyOptions().command()
    found = find_framework("keras")
    assert [package for package, _ in found.versions] == ["keras", "jax", "jaxlib"]
    assert found.settings() == {"framework": "keras", "backend": "jax", **dict(found.versions)}


def test_torch_keeps_the_settings_that_its_stored_runs_have() -> None:
    from batchnorm.studies.data import load_digits

    torch = find_framework("torch")
    settings = settings_of(plan(StudyOptions())[0], load_digits(), "f", torch)
    expected = ["format", "data", "network", "batch_size", "depth", "epochs", "optimizer", "momentum"]
    expected += ["weight_decay", "target_accuracy", "loss", "metric", "arm", "learning_rate", "seed"]
    expected += ["network_source", "loss_source", "metric_source"]
    assert list(settings) == [*expected, "torch", "batchnorm"]


def test_tensorflow_is_found_under_whichever_name_it_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    version = dict(find_framework("keras").versions)["tensorflow"]
    assert version[0].isdigit()


def test_names_are_those_that_people_use() -> None:
    jax = Framework("keras", "jax", ())
    assert framework_in_words(jax.describe()) == "Keras on JAX"
    assert framework_in_words(Framework("torch", None, ()).describe()) == "PyTorch"
    assert framework_in_words({}) is None


def _keras_results() -> dict[str, Any]:
    """As a study on TensorFlow or JAX leaves them: nobody could count the bytes that are kept."""
    runs = [record(arm=arm, seed=seed) for arm in ("none", "batchnorm") for seed in (0, 1)]
    content = results(runs, framework="keras", backend="jax")
    for run in content["runs"]:
        run["bytes_kept_for_backward"] = None
    for arm in content["networks"]["mlp"].values():
        arm["bytes_kept_for_backward"] = {"mean": None, "std": None, "values": [None, None]}
        arm["seconds_per_step"]["median"] = 0.4e-3
        arm["diverged"] = 0
    return content


def test_the_report_says_the_framework_and_what_was_not_measured(tmp_path: Path) -> None:
    page = write_report(write(tmp_path, _keras_results())).read_text(encoding="utf-8")
    assert '<p class="facts">Keras on JAX · 1' in page
    assert "<dt>Framework</dt><dd>Keras on JAX</dd>" in page
    assert "<dt>Backend</dt>" not in page
    assert page.count("<td>not measured</td>") == 2
    assert "What it keeps for the backward pass was not measured." in page
    assert "memory kept, MB" not in page


def test_the_table_says_the_framework_and_leaves_out_what_was_not_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = _keras_results()
    print_results(content)
    shown = capsys.readouterr().out
    assert "Keras on JAX" in shown
    assert "kB kept: not measured" in shown
    assert shown.count("kB kept") == 1  # and no column
    content["networks"]["mlp"]["none"]["bytes_kept_for_backward"]["mean"] = 120_000.0
    print_results(content)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(row for row in rows if row[:1] == ["none"])[-1] == "120"
    assert next(row for row in rows if row[:1] == ["batchnorm"])[-2:] == ["not", "measured"]


def test_the_command_fails_in_one_line_where_the_backend_is_missing(tmp_path: Path) -> None:
    own = write_own_code(tmp_path)
    blocked = "import sys; sys.modules['jax'] = None; from batchnorm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", blocked, "study", "--framework", "keras", "--data", f"{own}:data"],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: KERAS_BACKEND names jax, which is not installed: pip install jax, or set")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
