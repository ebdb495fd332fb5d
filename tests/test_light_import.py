"""`import batchnorm` is light, its names resolve on first use, and it changes nothing of anybody's set-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "keras",
    "tensorflow",
    "jax",
    "numba",
    "triton",
    "matplotlib",
    "numpy",
    "rich",
    "typer",
    "jinja2",
)


def run_python(code: str) -> str:
    """Run the code in a fresh interpreter, with warnings as errors, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"KERAS_BACKEND": "torch"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has imported after the code."""
    loaded = run_python(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    return set(HEAVY) & {name.partition(".")[0] for name in json.loads(loaded.splitlines()[-1])}


def test_import_is_light() -> None:
    assert imported_by("import batchnorm, batchnorm.errors; dir(batchnorm)") == set()


def test_import_of_something_heavy_is_found() -> None:
    assert imported_by("import batchnorm, numpy.linalg, jinja2") == {"numpy", "jinja2"}


def test_unknown_attribute_is_an_attribute_error() -> None:
    import batchnorm

    with pytest.raises(AttributeError, match="module 'batchnorm' has no attribute 'BatchNorm4d'"):
        batchnorm.BatchNorm4d  # noqa: B018 -- the access is the test
    assert not hasattr(batchnorm, "BatchNorm4d")


BLOCK_TORCH = """
import sys

class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked)
"""


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "functional", "calibrate"])
def test_missing_framework_is_an_error_that_names_the_extra(name: str) -> None:
    message = run_python(
        f"{BLOCK_TORCH}\n"
        "import batchnorm\n"
        "try:\n"
        f"    batchnorm.{name}\n"
        "except ImportError as error:\n"
        "    assert type(error) is batchnorm.errors.MissingExtraError, type(error)\n"
        "    assert isinstance(error, batchnorm.errors.BatchNormError)\n"
        "    assert error.name == 'torch', error.name\n"
        "    print(error)\n"
    )
    assert f"batchnorm.{name} needs torch" in message
    assert "pip install 'batchnorm[torch]'" in message


SETTINGS = """
import random, warnings
import numpy, torch, keras  # what importing them sets is theirs

def settings():
    return (
        list(warnings.filters),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_num_interop_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        torch.get_rng_state().tolist(),
        repr(numpy.random.get_state()),
        numpy.geterr(),
        random.getstate(),
    )

before = settings()
"""


def test_every_public_name_resolves_and_stays_and_changes_no_setting() -> None:
    """In one process, which takes seconds to start; and `settings` does see what changes."""
    changes = (
        "warnings.simplefilter('ignore')",
        "torch.set_default_dtype(torch.float64)",
        "torch.set_num_threads(torch.get_num_threads() + 1)",
        "torch.rand(1)",
        "numpy.random.rand(700)",
        "random.random()",
    )
    run_python(
        f"{SETTINGS}\n"
        "import batchnorm\n"
        "for name in batchnorm.__all__:\n"
        "    assert getattr(batchnorm, name) is getattr(batchnorm, name), name\n"
        "    assert name in dir(batchnorm), name\n"
        "    for was, now in zip(before, settings(), strict=True):\n"
        "        assert was == now, (name, was, now)\n"
        "assert issubclass(batchnorm.BatchNorm2d, torch.nn.BatchNorm2d)\n"
        f"for change in {changes!r}:\n"
        "    exec(change)\n"
        "    before, then = settings(), before\n"
        "    assert then != before, change\n"
    )
