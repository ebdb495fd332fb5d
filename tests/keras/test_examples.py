"""examples/keras_digits.py runs and learns on this backend, in its older spellings too."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.support.programs import EXAMPLES, held_out_accuracy

PROGRAM = EXAMPLES / "keras_digits.py"


@pytest.mark.slow
def test_keras_digits() -> None:
    assert held_out_accuracy(PROGRAM) > 0.85


def test_keras_callbacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported the backend."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "keras_callbacks.py"))
    printed = capsys.readouterr().out
    assert "1 batch normalization, 0 serious" in printed
    assert float(printed.split()[-1].rstrip("%")) > 85
    rows = (tmp_path / "norms.csv").read_text(encoding="utf-8").splitlines()
    steps = {line.split(",")[0] for line in rows[1:] if "mean_distance" in line}
    assert steps == {"0", "25", "50", "75", "100"}


def test_older_spellings(tmp_path: Path, backend: str) -> None:
    """`tensorflow.keras` instead of `keras`, and `input_shape=` in the first layer."""
    if backend != "tensorflow":
        pytest.skip("the older spellings are TensorFlow's")
    code = PROGRAM.read_text(encoding="utf-8")
    changes = {
        '[Input((784,)), Dense(64, activation="relu"),': '[Dense(64, activation="relu", input_shape=(784,)),',
        "import Input, Sequential, utils": "import Sequential, utils",
        "epochs=10": "epochs=3",  # time; it has learned by then
        "\nfrom keras ": "\nfrom tensorflow.keras ",
        "\nfrom keras.layers ": "\nfrom tensorflow.keras.layers ",
    }
    for here, older_spelling in changes.items():
        assert code.count(here) == 1, here
        code = code.replace(here, older_spelling)
    program = tmp_path / "older.py"
    program.write_text(code, encoding="utf-8")
    assert held_out_accuracy(program) > 0.85
