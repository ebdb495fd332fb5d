"""README, docs and docstrings: code runs, figures are those of the result files, names those of the code."""

from __future__ import annotations

import doctest
import pkgutil
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import batchnorm
from benchmarks import page, pictures
from scripts import draw_floors

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks_of(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


BLOCKS = [
    (f"{path.name}-{number}", code)
    for path in sorted((ROOT / "docs").glob("*.md"))
    for number, code in enumerate(blocks_of(path))
]
# The programs of examples/, which test_examples.py runs: nothing else in the documents loads the digits.
EXAMPLES = {name: code for name, code in BLOCKS if "load_digits" in code}
CODE = [pytest.param(code, id=name) for name, code in BLOCKS if name not in EXAMPLES]


@pytest.mark.parametrize("code", CODE)
def test_code_blocks_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "block", "exec"), {})
    printed = capsys.readouterr().out
    assert ("Calibrated 1 layers on 256 samples" in printed) == ("calibrate(" in code), printed


def test_readme_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    """What its blocks take as given is a reader's own: a model of stock layers, a batch, a loss, data."""
    model = nn.Sequential(
        nn.Conv1d(4, 8, 3),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    x, y, lengths = torch.randn(16, 4, 12), torch.randint(3, (16,)), torch.randint(3, 13, (16,))
    data = list(zip(torch.randn(256, 4, 12).split(32), torch.randint(3, (256,)).split(32), strict=True))
    given = {"batchnorm": batchnorm, "torch": torch, "model": model, "criterion": nn.CrossEntropyLoss()}
    given |= {"x": x, "y": y, "lengths": lengths, "data": data}
    blocks = blocks_of(README)
    assert len(blocks) == 3
    for code in blocks:
        exec(compile(code, "README", "exec"), given)
    assert isinstance(model[1], batchnorm.BatchNorm1d)
    given["loss"].backward()
    printed = capsys.readouterr().out
    assert "batch normalization" in printed
    assert "Calibrated 1 layers on 256 samples" in printed
    pooled = model[0](torch.cat([batch for batch, _ in data]))
    torch.testing.assert_close(model[1].running_mean, pooled.mean((0, 2)), rtol=1e-5, atol=1e-6)
    assert not any("BatchNorm" in type(module).__name__ for module in given["small"].modules())
    torch.testing.assert_close(given["program"].module()(x), model(x), rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_say_what_the_result_files_do(name: str) -> None:
    """Their descriptions have the numbers; where a line is drawn changes with matplotlib's version."""
    drawn = ElementTree.parse(pictures.DOCS / f"{name}.svg").getroot()
    told = {element.tag.rpartition("}")[2]: element.text for element in drawn[:3]}
    fresh = pictures.picture(name)
    assert (told["title"], told["desc"]) == (fresh.title, fresh.alt), "run python -m benchmarks.page"
    assert re.search(r"\d", fresh.alt)


def test_a_changed_figure_is_found() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.filled(text.replace("e-08", "e-09", 1)) == text


def test_local_links_lead_somewhere() -> None:
    for path in ROOT.glob("*.md"):
        for target in re.findall(r'(?:\]\(|src=")([^)#:"]+)[)"]', path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_picture_of_the_floors_is_of_the_imports() -> None:
    drawn = draw_floors.PICTURE.read_text(encoding="utf-8")
    assert drawn == draw_floors.picture(), "run python scripts/draw_floors.py"


def test_documents_name_every_public_name_and_none_that_is_not_there() -> None:
    pages = [README, *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    named = set(re.findall(r"(?<![\w/.])batchnorm(?:\.[A-Za-z]\w*)+", text))
    code = " ".join(re.findall(r"```[\s\S]*?```|`[^`\n]+`|^ {4}.*$", text, re.MULTILINE))
    assert set(batchnorm.__all__) <= set(re.findall(r"\w+", code)) | {"__version__"}
    for name in sorted(named):
        assert pkgutil.resolve_name(name) is not None
