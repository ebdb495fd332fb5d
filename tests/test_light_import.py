"""`import batchnorm` is light, its names resolve on first use, and it changes no setting of the process."""

from __future__ import annotations

import ast
import json
import pkgutil
from pathlib import Path

import pytest

import batchnorm
from tests.support.programs import run_python

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
    "lightning",
    "transformers",
    "tensorboard",
    "distributed",
)


def run_code(code: str) -> str:
    """Run the code in a fresh interpreter, with warnings as errors, and return what it printed."""
    return run_python("-W", "error", "-c", code, KERAS_BACKEND="torch")


def imported_by(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has imported after the code."""
    loaded = run_code(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    return set(HEAVY) & {name.partition(".")[0] for name in json.loads(loaded.splitlines()[-1])}


def test_import_is_light() -> None:
    light = "import batchnorm, batchnorm.errors, batchnorm.conventions, batchnorm.loggers; dir(batchnorm)\n"
    light += "import batchnorm.integrations"
    assert imported_by(light) == set()


def test_import_of_something_heavy_is_found() -> None:
    assert imported_by("import batchnorm, numpy.linalg, jinja2") == {"numpy", "jinja2"}


MODULES = sorted(name for name, (_, attribute) in batchnorm._HOMES.items() if attribute is None)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import", "attribute"])
def test_row_73_every_public_module_imports_as_one(first: str) -> None:
    """Row 73: `import batchnorm.functional` and `from batchnorm.functional import ...`, the same object."""
    assert {"conventions", "errors", "functional", "keras", "kernels"} <= set(MODULES)
    imports = [f"import batchnorm.{name} as imported_{name}" for name in MODULES]
    attributes = ["import batchnorm", *(f"attribute_{name} = batchnorm.{name}" for name in MODULES)]
    checks = [
        f"from batchnorm import {name}\n"
        f"assert imported_{name} is attribute_{name} is {name} is sys.modules['batchnorm.{name}'], {name}\n"
        f"assert all(hasattr({name}, public) for public in getattr({name}, '__all__', ())), {name}"
        for name in MODULES
    ]
    both = [imports, attributes] if first == "import" else [attributes, imports]
    run_code("\n".join(["import sys", *both[0], *both[1], *checks]))


def test_functions_import_from_the_public_module() -> None:
    from batchnorm.functional import batch_norm
    from batchnorm.torch import functional

    assert batch_norm is functional.batch_norm
    assert set(batchnorm.functional.__all__) == set(functional.__all__)


def test_type_checkers_and_completion_see_every_public_name() -> None:
    """They read the TYPE_CHECKING block and the files beside it; running mypy itself would take a minute."""
    source = ast.parse(Path(batchnorm.__file__).read_text())
    (block,) = (node for node in source.body if isinstance(node, ast.If))
    seen = {name.asname or name.name for node in block.body for name in node.names}
    assert seen | {"__version__"} == set(batchnorm.__all__) == set(batchnorm._HOMES) | {"__version__"}
    assert set(MODULES) <= {module.name for module in pkgutil.iter_modules(batchnorm.__path__)}


def test_unknown_attribute_is_an_attribute_error() -> None:
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
    message = run_code(
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


@pytest.mark.parametrize("name", ["functional", "kernels"])
def test_import_of_a_module_names_the_extra_too(name: str) -> None:
    message = run_code(
        f"{BLOCK_TORCH}\ntry:\n    import batchnorm.{name}\nexcept ImportError as error:\n    print(error)\n"
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
    run_code(
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
