"""Checks what `make dist` has built: the files in it, their size, and that it works in empty environments.

    python -m build && python scripts/check_dist.py

Each environment has the wheel, the packages of one case, and nothing of this checkout: a smoke test runs in a
temporary folder there. torch's ordinary build for Linux brings some 3 GB of libraries for GPUs;
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes its CPU build.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DATA = ".npz"  # what the study brings along
MOST, MOST_WITHOUT_DATA = 3_000_000, 1_000_000  # bytes of the wheel, compressed
IN_WHEEL = (
    "py.typed",
    "reference/__init__.py",
    "kernels/cpu/jit.py",
    "studies/digits.npz",
    "studies/digits.md",
)
IN_SDIST = ("Makefile", "constraints.txt", "tests/conftest.py", "docs/architecture.md", "CONTRIBUTING.md")


class Case(NamedTuple):
    """An empty environment: the extras of the wheel, packages beside it, and a program that must succeed."""

    name: str
    extras: str
    packages: tuple[str, ...]
    program: str


_BARE = """
import batchnorm, batchnorm.conventions, batchnorm.reference
try:
    batchnorm.BatchNorm2d
except batchnorm.errors.MissingExtraError as error:
    assert "pip install 'batchnorm[torch]'" in str(error), error
else:
    raise AssertionError("torch is here")
"""
_TORCH = """
import torch, batchnorm
torch.manual_seed(0)
x = (3 + torch.randn(64, 5, 8, 8)).requires_grad_()
layer = batchnorm.BatchNorm2d(5)
assert batchnorm.kernels.explain(x).startswith("cpu for"), batchnorm.kernels.explain(x)
y, dy = layer(x), torch.randn(x.shape)
(y * dy).sum().backward()
dx, = torch.autograd.grad((torch.nn.BatchNorm2d(5)(x) * dy).sum(), x)
torch.testing.assert_close(x.grad, dx)
model = torch.nn.Sequential(layer)
assert "Calibrated 1 layers" in str(batchnorm.calibrate(model, x.detach().split(16)))
"""
_KERAS = """
import os
os.environ["KERAS_BACKEND"] = "jax"
import numpy as np, batchnorm.keras
x = 3 + np.random.default_rng(0).standard_normal((64, 5)).astype("float32")
y = np.asarray(batchnorm.keras.BatchNormalization(epsilon=0.0)(x, training=True))
assert abs(y.mean()) < 1e-5 and abs(y.std() - 1) < 1e-4, (y.mean(), y.std())
"""
_STUDY = """
import subprocess
options = "--network mlp --arms none,batchnorm --learning-rate 0.01 --seeds 1 --epochs 1 --out study"
subprocess.run(["batchnorm", "study", *options.split()], check=True)
"""
CASES = (
    Case("without a framework", "", (), _BARE),
    Case("with torch", "[torch]", (), _TORCH),
    Case("with Keras on JAX", "[keras]", ("jax",), _KERAS),
    Case("with the study", "[study]", (), _STUDY),
)


def main() -> None:
    """Checks the one wheel and the one sdist of dist/."""
    (wheel,), (sdist,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    for case in CASES:
        check_case(case, wheel)


def check_wheel(wheel: Path) -> None:
    """Checks the size, the files and the description of the wheel."""
    with zipfile.ZipFile(wheel) as file:
        entries = file.infolist()
        names = {entry.filename for entry in entries}
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        check_description(file.read(metadata).decode("utf-8"))
    data = sum(entry.compress_size for entry in entries if entry.filename.endswith(DATA))
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size:,} bytes, {size - data:,} without the study's data")
    assert size <= MOST, f"more than {MOST:,} bytes"
    assert size - data <= MOST_WITHOUT_DATA, f"more than {MOST_WITHOUT_DATA:,} bytes without the data"
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"batchnorm"}, tops
    missing = {f"batchnorm/{name}" for name in IN_WHEEL} - names
    assert not missing, missing
    stray = {name for name in names if "__pycache__" in name or "test" in Path(name).stem.split("_")}
    assert not stray, stray


def check_description(text: str) -> None:
    """Checks that what a package index shows is the README, without a link that leads nowhere there."""
    assert "batchnorm.convert(model)" in text, "the README is not in the metadata"
    nowhere = re.findall(r"\]\((?!https?:)[^)]*\)|<img src=\"(?!https?:)[^>]*>", text)
    assert not nowhere, f"links into the repository: {nowhere}"


def check_sdist(sdist: Path) -> None:
    """Checks that the source distribution has what builds, tests and documents the package."""
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert not set(IN_SDIST) - names, set(IN_SDIST) - names


def check_case(case: Case, wheel: Path) -> None:
    """Installs the wheel in an empty environment, and runs the program and `batchnorm env` there."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "venv", with_pip=True)
        programs = Path(folder) / "venv" / ("Scripts" if os.name == "nt" else "bin")
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        variables["PATH"] = os.pathsep.join([str(programs), variables["PATH"]])

        def run(*words: str) -> None:
            subprocess.run(words, check=True, cwd=folder, env=variables)

        quietly = ("--quiet", "--disable-pip-version-check", "--constraint", str(ROOT / "constraints.txt"))
        python = str(programs / "python")
        run(python, "-m", "pip", "install", *quietly, f"{wheel}{case.extras}", *case.packages)
        run(python, "-W", "error", "-c", case.program)
        run("batchnorm", "env")
        print(f"works {case.name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
