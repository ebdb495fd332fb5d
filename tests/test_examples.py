"""examples/ for PyTorch runs and learns; tests/keras has the one for Keras."""

from __future__ import annotations

from .support.programs import EXAMPLES, held_out_accuracy, run_python


def test_torch_digits() -> None:
    assert held_out_accuracy(EXAMPLES / "torch_digits.py") > 0.85


def test_examples_are_short() -> None:
    for program in EXAMPLES.glob("*.py"):
        assert len(program.read_text(encoding="utf-8").splitlines()) <= 30, program.name


def test_digits_need_no_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'keras', 'typer', 'rich', 'matplotlib', 'jinja2'):\n"
        "    sys.modules[name] = None\n"
        "from batchnorm.study.data import load_digits\n"
        "assert load_digits().x_train.shape == (2500, 28, 28)\n"
    )
    run_python("-c", code)
