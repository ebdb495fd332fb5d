"""The framework that a study trains in: found, named and versioned without importing it."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from batchnorm.errors import MissingExtraError, OptionError

FRAMEWORKS = ("torch", "keras")

# The backends of Keras that can train, and the packages whose versions decide what they compute.
_BACKENDS = {"tensorflow": ("tensorflow",), "jax": ("jax", "jaxlib"), "torch": ("torch",)}
_DEFAULT_BACKEND = "tensorflow"  # Keras's own

_IN_WORDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch", "keras": "Keras"}


@dataclass(frozen=True)
class Framework:
    """A framework that is installed.

    Attributes:
        name: `torch` or `keras`.
        backend: of Keras: `tensorflow`, `jax` or `torch`; None for torch itself.
        versions: `(package, version)` of everything that decides what a run comes to.
    """

    name: str
    backend: str | None
    versions: tuple[tuple[str, str], ...]

    def settings(self) -> dict[str, object]:
        """Returns the settings of a stored run that tell it from another framework's."""
        return {**({} if self.backend is None else self.describe()), **dict(self.versions)}

    def describe(self) -> dict[str, object]:
        """Returns its name, for the provenance of results."""
        return {"framework": self.name, **({} if self.backend is None else {"backend": self.backend})}


def find_framework(name: str) -> Framework:
    """Returns the framework of this name, as it is installed.

    Raises:
        MissingExtraError: it is not installed.
        OptionError: Keras is, but the backend that it would take is not, or cannot train.
    """
    if name == "torch":
        if not _is_installed("torch"):
            raise MissingExtraError("batchnorm study", "torch", "study")
        return Framework("torch", None, installed_versions("torch"))
    if not _is_installed("keras"):
        raise MissingExtraError("batchnorm study --framework keras", "keras", "keras")
    backend, origin = _chosen_backend()
    if backend not in _BACKENDS:
        raise OptionError(
            f"{origin}, which trains nothing: set KERAS_BACKEND to one of {', '.join(_BACKENDS)}"
        )
    if not _is_installed(backend):
        others = ", ".join(other for other in _BACKENDS if _is_installed(other))
        choose = f", or set KERAS_BACKEND to one that is: {others}" if others else ""
        raise OptionError(f"{origin}, which is not installed: pip install {backend}{choose}")
    return Framework("keras", backend, installed_versions("keras", *_BACKENDS[backend]))


def framework_in_words(provenance: Mapping[str, Any]) -> str | None:
    """Returns the usual name of the framework of results: "PyTorch", "Keras on JAX"; None if not known."""
    names = [provenance.get(key) for key in ("framework", "backend")]
    return " on ".join(_IN_WORDS.get(name, name) for name in names if isinstance(name, str)) or None


def keras_backend() -> str:
    """Returns the backend that Keras takes: that of KERAS_BACKEND, its configuration, or its default."""
    return _chosen_backend()[0]


def _chosen_backend() -> tuple[str, str]:
    """Returns the backend's name, and in words what chose it."""
    if named := os.environ.get("KERAS_BACKEND"):
        return named, f"KERAS_BACKEND names {named}"
    path = _configuration()
    try:
        stored = json.loads(path.read_text(encoding="utf-8")).get("backend")
    except (OSError, ValueError, AttributeError):
        stored = None
    if isinstance(stored, str) and stored:
        return stored, f"no KERAS_BACKEND is set and {path} names {stored}"
    return _DEFAULT_BACKEND, f"no KERAS_BACKEND is set and Keras's default is {_DEFAULT_BACKEND}"


def _configuration() -> Path:
    """Returns the path of Keras's configuration by its rule, as asking Keras would import a backend."""
    if home := os.environ.get("KERAS_HOME"):
        return Path(home).expanduser() / "keras.json"
    user = Path("~").expanduser()
    return (user if os.access(user, os.W_OK) else Path("/tmp")) / ".keras" / "keras.json"


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def installed_versions(*modules: str) -> tuple[tuple[str, str], ...]:
    """Returns the version of each of these packages, `unknown` where it has none."""
    return tuple((module, _version(module)) for module in modules)


def _version(module: str) -> str:
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:  # tensorflow also comes as tensorflow-cpu, keras as keras-nightly
        packages = metadata.packages_distributions().get(module, [])
        return metadata.version(packages[0]) if packages else "unknown"
