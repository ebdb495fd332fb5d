"""The documentation site: what its extensions make of docstrings, and that no public name is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import batchnorm

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "site")


@pytest.fixture(autouse=True)
def _extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "site")


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    named = set(re.findall(r"auto(?:class|function|module):: (?:batchnorm\.)?([\w.]+)", text))
    kernels = {f"kernels.{name}" for name in batchnorm.kernels.__all__}
    assert set(batchnorm.__all__) - {"__version__", "kernels"} | kernels <= named


def test_every_page_is_in_the_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = "\n".join(re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL)).split()
    names = {str(path.relative_to(DOCS).with_suffix("")) for path in PAGES} - {"index"}
    assert names <= set(trees)
    listed = re.findall(r"\]\(([\w/-]+)\.html\)", (DOCS / "llms.txt").read_text(encoding="utf-8"))
    assert names == set(listed)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    """Sphinx checks anchors too; this is for readers of the repository, and takes no minute."""
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_docstrings_become_restructured_text() -> None:
    from docstrings import as_restructured_text

    given = [
        "Halves |x|.",
        "",
        "    y = |x| / 2",
        "    z = y",
        "",
        "Args:",
        "    x: at |x| > 0:",
        "        none",
        "",
    ]
    given += ["Source: He 2015."]
    made = [
        "Halves \\|x\\|.",
        "",
        "::",
        "",
        "    y = |x| / 2",
        "    z = y",
        "",
        "Args:",
        "    x: at \\|x\\| > 0:",
    ]
    assert as_restructured_text(given) == [*made, "        none", "", "**Source**: He 2015."]


def test_pages_of_the_repository_become_pages_of_the_site() -> None:
    from repository_pages import for_the_site

    given = '| <a id="gap"></a>`gap` | [digits.md](../src/batchnorm/studies/digits.md), [fold](fold.md) |'
    assert for_the_site(given) == "| [`gap`]{#gap} | `digits.md`, [fold](fold.md) |"
