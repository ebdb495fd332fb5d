"""The report is one page that needs nothing else, trusts no name, and is the same every time."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from batchnorm.errors import DataError, FileError
from batchnorm.studies.report import write_report
from tests.study.results_fixture import record, results, usual, write

pytestmark = pytest.mark.xdist_group("report")  # a page takes seconds to draw

VOID = {"meta", "link", "br", "img", "input", "hr"}
ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"


class Page(HTMLParser):
    """The content of a page: its tags, ids, headings and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.headings: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def _report(folder: Path, content: dict[str, Any]) -> str:
    return write_report(write(folder, content)).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _report(
        tmp_path_factory.mktemp("report"), usual(["none", "batchnorm", "l1", "layernorm"], seeds=2)
    )


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_the_page_is_well_formed(page: Page) -> None:
    assert page.unbalanced == []
    assert page.open == []
    assert page.headings[0] == "h1"
    assert page.headings.count("h1") == 1
    assert page.headings[1] == "h2"


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
        href = attributes.get("href") or ""
        assert not href.startswith("#") or href[1:] in ids


def test_nothing_is_asked_of_the_network(source: str, page: Page) -> None:
    """The library's own text names its home; the policy lets no script of the page load anything."""
    scripts = re.compile(r"<script>.*?</script>", re.DOTALL)
    assert not re.search(r"https?:|url\((?!#)|@import|//[a-z]", scripts.sub("", source))
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "img", "object", "embed", "base", "form")
        assert tag != "script" or set(attributes) <= {"type"}
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))


def test_the_policy_allows_the_two_scripts_by_hash_and_nothing_else(source: str, page: Page) -> None:
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert set(rules) == {"default-src", "script-src", "style-src", "img-src"}
    run = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert rules["script-src"].split() == [f"'sha256-{one}'" for one in hashes]
    assert len(hashes) == 2


def test_the_library_is_the_one_that_its_authors_released() -> None:
    """Version 1.6.32 of uPlot, from the package registry npm."""
    folder = files("batchnorm.studies") / "templates"
    found = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
        for name in ("uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE")
    }
    assert found == {
        "uPlot.iife.min.js": "19c8d4c6ad88929a",
        "uPlot.min.css": "df630c6a8d6f8eea",
        "uPlot.LICENSE": "8f989229699b4fe2",
    }
    own = (folder / "report.js").read_text(encoding="utf-8")
    assert own.count("\n") <= 300
    assert "</script" not in own


def test_every_picture_brings_its_values(source: str) -> None:
    values = re.findall(r'<script type="application/json">(.*?)</script>', source, re.DOTALL)
    assert len(values) == source.count("<svg") == 2 * 9
    for text in values:
        content = json.loads(text)
        assert content["curves"]
        for curve in content["curves"]:
            assert len(curve["of"]) == len(content["labels"])
            assert len(curve["x"]) in (0, len(curve["y"]))


def test_every_picture_has_a_name(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 2 * 9
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert attributes["aria-labelledby"]
        assert "width" not in attributes  # it takes the width that there is


def test_verdicts_table_method_and_command_are_there(page: Page) -> None:
    for words in (
        "In short",
        "Does it train faster?",
        "Does it tolerate larger learning rates?",
        "Does it keep gradients alive in a deep network?",
        "What does it cost per step?",
        "All arms of deep, each at its best learning rate",
        "95 % interval",
        "2 seeds",
        "1,000 held-out examples",
        "1 MB is 1,000,000 bytes",
        "batchnorm study --network mlp,deep",
        "torch 2.13.0",
        "48 training runs, of which 1 diverged",
    ):
        assert words in page.text.replace("\N{NO-BREAK SPACE}", " "), words


def test_no_raw_value_is_printed(page: Page) -> None:
    assert not re.search(r"\b(nan|NaN|None|inf|Infinity|null)\b", page.text)


def test_the_same_results_make_the_same_report(tmp_path: Path) -> None:
    content = results([record(arm=arm, seed=seed) for arm in ("none", "batchnorm") for seed in range(2)])
    assert _report(tmp_path / "a", content) == _report(tmp_path / "b", content)


def test_names_from_outside_are_escaped(tmp_path: Path) -> None:
    content = usual(["none", "batchnorm"], seeds=1)
    for run in content["runs"]:
        run["network"] = run["network"].replace("mlp", f"{ATTACK}.py:build")
        run["arm"] = run["arm"].replace("none", f"none{ATTACK}")
        for kind in ("gradient_norm", "input_drift"):
            layers = run[kind]["layers"]
            run[kind]["layers"] = {f"{ATTACK}{name}": value for name, value in layers.items()}
    content["networks"][f"{ATTACK}.py:build"] = content["networks"].pop("mlp")
    provenance = content["provenance"]
    provenance["data"] = {"name": ATTACK, "held_out": 1000, ATTACK: ATTACK}
    provenance[ATTACK] = [ATTACK, {ATTACK: None}]
    provenance["command"] = ATTACK
    source = _report(tmp_path, content)
    page = Page(source)
    assert page.unbalanced == []
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert source.count("<script>") == 2
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2 + source.count("<svg")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "49" not in page.text.split("To repeat this study")[1]
    assert "<script>alert(1)</script>" in page.text  # as text


def test_a_diverged_study_is_reported(tmp_path: Path) -> None:
    lost = [record(arm=arm, seed=seed, diverged=True) for arm in ("none", "batchnorm") for seed in range(2)]
    page = Page(_report(tmp_path, results(lost)))
    assert "4 training runs, of which 4 diverged" in page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "not reached" in page.text


@pytest.mark.parametrize("arms", [["batchnorm"], ["none"], ["l1", "layernorm"]])
def test_any_subset_of_arms_is_reported(tmp_path: Path, arms: list[str]) -> None:
    page = Page(_report(tmp_path, usual(arms, seeds=1, networks=["deep"])))
    assert page.unbalanced == []
    assert "Trains faster" not in page.text
    assert not re.search(r"\b(nan|NaN|None|null)\b", page.text)


@pytest.mark.parametrize("finished", [1, 8])
def test_a_report_before_the_end_says_how_much_is_missing(tmp_path: Path, finished: int) -> None:
    content = usual(["none", "batchnorm"], seeds=2)
    planned = len(content["runs"])
    content["runs"] = content["runs"][:finished]
    content["networks"] = {"mlp": {"none": content["networks"]["mlp"]["none"]}}
    content["provenance"] |= {"runs_planned": planned, "runs_finished": finished}
    source = _report(tmp_path, content)
    assert f"{finished} of {planned} training runs are finished." in Page(source).text
    assert 'http-equiv="refresh"' in source
    assert "Runs planned" not in source
    assert 'http-equiv="refresh"' not in _report(tmp_path, usual(["none"], seeds=1))


def test_one_seed_is_called_an_indication(tmp_path: Path) -> None:
    page = Page(_report(tmp_path, results([record(arm=arm) for arm in ("none", "batchnorm")])))
    assert "With one seed, this is an indication and no more." in page.text
    assert "✓" not in page.text


def test_sparse_results_suffice(tmp_path: Path) -> None:
    """Runs without the summaries, and nothing said of where they come from."""
    content = {"runs": [copy.deepcopy(record(arm=arm)) for arm in ("none", "batchnorm")]}
    page = Page(_report(tmp_path, content))
    assert "What batch normalization buys on this data" in page.text


def test_half_a_character_does_not_stop_the_report(tmp_path: Path) -> None:
    assert Page(_report(tmp_path, results([record(network="a\ud800\x00b")]))).unbalanced == []


def test_a_report_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    path = write_report(write(tmp_path, results([record()])))
    before = path.read_bytes()
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        write_report(tmp_path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*results\.json"):
        write_report(tmp_path / "nowhere")


def test_a_place_that_refuses_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(FileError, match=r"report\.html cannot be written: Is a directory"):
        write_report(write(tmp_path, results([record()])))


def test_plain_models_are_named_beside_the_arms(tmp_path: Path) -> None:
    content = results([record()])
    content["provenance"]["data"][0]["baselines"] = {"a plain <b>model</b>": 0.684}
    page = Page(_report(tmp_path, content))
    expected = "on the same examples of digits: a plain <b>model</b> 68.4\N{NO-BREAK SPACE}% (scikit-learn)."
    assert expected.replace("\N{NO-BREAK SPACE}", " ") in page.text
