"""README, docs and docstrings: code runs, figures are those of the result files, names those of the code."""

from __future__ import annotations

import doctest
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import batchnorm
from benchmarks import page
from scripts import draw_floors

ROOT = Path(__file__).parent.parent
BLOCKS = [
    (f"{path.name}-{number}", code)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    )
]
# The programs of examples/, which test_examples.py runs: nothing else in the documents loads the digits.
EXAMPLES = {name: code for name, code in BLOCKS if "load_digits" in code}
CODE = [pytest.param(code, id=name) for name, code in BLOCKS if name not in EXAMPLES]


@pytest.mark.parametrize("code", CODE)
def test_code_blocks_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "block", "exec"), {})
    printed = capsys.readouterr().out
    assert ("Calibrated 1 layers on 256 samples" in printed) == ("calibrate(" in code), printed


def test_examples_are_shown_as_they_are() -> None:
    programs = {path.read_text(encoding="utf-8"): path.name for path in (ROOT / "examples").glob("*.py")}
    for name, code in EXAMPLES.items():
        assert code in programs, f"{name} is not equal to any of {sorted(programs.values())}"
    assert set(EXAMPLES.values()) == set(programs)


# Every public name that is called, but for one that changes its process for good: see test_allocator.py.
PUBLIC = sorted(name for name, (_, attribute) in batchnorm._HOMES.items() if attribute)
PUBLIC.remove("reuse_memory")


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_in_docstrings_run(name: str) -> None:
    given = {"batchnorm": batchnorm, "torch": torch, "nn": torch.nn}
    docstring = getattr(batchnorm, name).__doc__
    example = doctest.DocTestParser().get_doctest(docstring, given, name, None, None)
    assert example.examples, f"the docstring of batchnorm.{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.name)
def test_tables_are_those_of_the_result_files(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "<!-- / -->" in text
    assert page.filled(text) == text


def test_a_changed_figure_is_found() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.filled(text.replace("e-08", "e-09", 1)) == text


def test_local_links_lead_somewhere() -> None:
    for path in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_picture_of_the_floors_is_of_the_imports() -> None:
    drawn = draw_floors.PICTURE.read_text(encoding="utf-8")
    assert drawn == draw_floors.picture(), "run python scripts/draw_floors.py"


def test_documents_name_every_public_name_and_none_that_is_not_there() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    named = set(re.findall(r"(?<![\w/.])batchnorm(?:\.[A-Za-z]\w*)+", text))
    code = " ".join(re.findall(r"```[\s\S]*?```|`[^`\n]+`|^ {4}.*$", text, re.MULTILINE))
    assert set(batchnorm.__all__) <= set(re.findall(r"\w+", code)) | {"__version__"}
    for name in sorted(named):
        assert pkgutil.resolve_name(name) is not None
