"""Describes what batchnorm runs on, for a bug report: `batchnorm env`, with or without Typer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable

import batchnorm
from batchnorm.errors import in_one_line
from batchnorm.text_table import aligned

Values = dict[str, str]
Environment = dict[str, Values]

_PACKAGES = (
    "numpy",
    "torch",
    "numba",
    "llvmlite",
    "triton",
    "keras",
    "tensorflow",
    "tensorflow-cpu",
    "jax",
    "onnx",
    "onnxruntime",
)
_VARIABLES = (
    "BATCHNORM_ENGINE",
    "KERAS_BACKEND",
    "CUDA_VISIBLE_DEVICES",
    "MKL_NUM_THREADS",
    "NUMBA_CACHE_DIR",
    "NUMBA_DISABLE_JIT",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)


def environment() -> Environment:
    """Returns names and values under the headings `system`, `packages`, `torch`, `keras` and `variables`.

    A heading without anything to say is left out. What cannot be found out has the error as its value, since
    a bug report is often about a broken installation.
    """
    found = {
        "system": _system(),
        "packages": _packages(),
        "torch": _of_torch() if importlib.util.find_spec("torch") else {},
        "keras": _of_keras() if importlib.util.find_spec("keras") else {},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    return {heading: values for heading, values in found.items() if values}


def in_words(found: Environment, as_json: bool) -> str:
    """Returns an environment as a table, or as JSON."""
    if as_json:
        return json.dumps(found, indent=1)
    rows = [(heading, name, value) for heading, values in found.items() for name, value in values.items()]
    first = {heading: next(iter(values)) for heading, values in found.items()}
    return "\n".join(
        aligned([(heading if name == first[heading] else "", name, value) for heading, name, value in rows])
    )


def run_without_typer(words: list[str]) -> int:
    """Runs `env` and `--version`, and refuses every other command by name; returns the exit code."""
    if words[:1] == ["env"] and set(words[1:]) <= {"--json"}:
        print(in_words(environment(), as_json="--json" in words))
        return 0
    if words == ["--version"]:
        print(f"batchnorm {batchnorm.__version__}")
        return 0
    print(
        "error: the commands but `env` need typer, which is not installed: pip install 'batchnorm[study]'",
        file=sys.stderr,
    )
    return 1


def _system() -> Values:
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
    }


def _packages() -> Values:
    versions = {"batchnorm": batchnorm.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _of_torch() -> Values:
    def devices() -> str:
        gpus = (torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return f"{', '.join(['cpu', *gpus])}; built for CUDA: {torch.version.cuda or 'no'}"

    def engines() -> str:
        kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        return "; ".join(batchnorm.kernels.explain(torch.zeros(2, 1, device=kind)) for kind in kinds)

    try:
        import torch
    except Exception as error:
        return {"import": _told(error)}
    return {
        "build": torch.__version__,  # with its accelerator, which the version of the package omits
        "devices": _tried(devices),
        "threads": _tried(lambda: str(torch.get_num_threads())),
        "engine": _tried(engines),
        "kernels on disk": _tried(lambda: str(batchnorm.kernels.cache_folder() or "no folder is writable")),
    }


def _of_keras() -> Values:
    def backend() -> str:
        from batchnorm.studies.frameworks import keras_backend

        return keras_backend()

    return {"backend": _tried(backend)}


def _tried(question: Callable[[], str]) -> str:
    try:
        return question()
    except Exception as error:  # whatever a half-installed library raises
        return _told(error)


def _told(error: Exception) -> str:
    return in_one_line(f"{type(error).__name__}: {error}")
