"""What releases and automation rely on: one version, targets that exist, and checks that find mistakes."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path

import pytest

import batchnorm
from scripts import check_dist

ROOT = Path(__file__).parents[1]
DESCRIPTION = b"batchnorm.convert(model) [a page](https://example.org)"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def targets() -> set[str]:
    """The targets of the Makefile; `test-%` by the names before it."""
    rules = re.findall(r"^([a-z][\w -]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {name for rule in rules for name in rule.split()}


def test_every_target_that_is_called_exists() -> None:
    texts = [path.read_text() for path in (*WORKFLOWS, ROOT / ".ci" / "run", ROOT / "CONTRIBUTING.md")]
    called = {
        name for text in texts for name in re.findall(r"(?:^|run: |    )make ([\w-]+)", text, re.MULTILINE)
    }
    assert {"lint", "resolves", "test", "test-slow", "dist", "study"} <= called
    assert not {name for name in called if not name.endswith("-")} - targets()
    assert {"test-oldest", "test-newest"} <= targets()


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/batchnorm/version.py"
    assert not re.search(r"^version:", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+", batchnorm.__version__)


def test_users_see_no_extra_of_developers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {"torch", "keras", "study"} <= set(project["project"]["optional-dependencies"])
    assert not {"dev", "test", "docs"} & set(project["project"]["optional-dependencies"])
    assert {"dev", "test", "lint", "docs", "dist"} == set(project["dependency-groups"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"batchnorm/studies/digits.npz": None}, "digits.npz"),
        ({"batchnorm/test_layers.py": b""}, "test_layers"),
        ({"tests/test_layers.py": b""}, "tests"),
        ({"batchnorm/large.bin": bytes(check_dist.MOST_WITHOUT_DATA)}, "without the data"),
        ({"batchnorm/large.npz": bytes(check_dist.MOST)}, "more than 3,000,000"),
        ({"batchnorm-0.dist-info/METADATA": b"Name: batchnorm"}, "README is not in"),
        ({"batchnorm-0.dist-info/METADATA": DESCRIPTION + b"[a](b.md)"}, "links into the repository"),
        ({"batchnorm-0.dist-info/METADATA": DESCRIPTION + b'<img src="a.svg">'}, "links into the repository"),
    ],
)
def test_a_wheel_that_is_not_as_it_should_be(
    tmp_path: Path, change: dict[str, bytes | None], said: str | None
) -> None:
    files: dict[str, bytes | None] = {f"batchnorm/{name}": b"" for name in check_dist.IN_WHEEL}
    files |= {"batchnorm-0.dist-info/METADATA": DESCRIPTION} | change
    with zipfile.ZipFile(tmp_path / "batchnorm.whl", "w") as wheel:
        for name, content in files.items():
            if content is not None:
                wheel.writestr(name, content)
    if said is None:
        check_dist.check_wheel(tmp_path / "batchnorm.whl")
        return
    with pytest.raises(AssertionError, match=said):
        check_dist.check_wheel(tmp_path / "batchnorm.whl")
