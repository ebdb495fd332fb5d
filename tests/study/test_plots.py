"""Pictures show what was measured, say so in words, and can stand side by side in one page."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from batchnorm.studies.plots import Picture, illustrate, layers, multiples
from batchnorm.studies.plots.canvas import color_name, draw, shown
from batchnorm.studies.verdicts import Network, read
from tests.study.results_fixture import ARMS, record, results, usual, write

pytestmark = pytest.mark.xdist_group("plots")  # pictures take seconds to draw


def _pictures(network: Network, prefix: str = "n1") -> dict[str, Picture]:
    return {picture.key: picture for found in illustrate(network, prefix).values() for picture in found}


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, ...]:
    folder = tmp_path_factory.mktemp("study")
    return read(write(folder, usual(seeds=2)) / "results.json").networks


@pytest.fixture(scope="module")
def pictures(networks: tuple[Network, ...]) -> dict[str, Picture]:
    return _pictures(networks[1])


def _root(picture: Picture) -> ElementTree.Element:
    return ElementTree.fromstring(picture.svg)


def _texts(picture: Picture) -> list[str]:
    return ["".join(text.itertext()) for text in _root(picture).iter("text")]


def test_every_kind_of_picture_is_there(pictures: dict[str, Picture]) -> None:
    topics = (
        "speed1",
        "speed2",
        "speed3",
        "rates1",
        "accuracy1",
        "gradients1",
        "drift1",
        "statistics1",
        "cost1",
    )
    assert list(pictures) == [f"n1-{topic}" for topic in topics]


@pytest.mark.parametrize("topic", ["speed1", "speed2", "rates1"])
def test_each_arm_has_its_panel(pictures: dict[str, Picture], topic: str) -> None:
    texts = _texts(pictures[f"n1-{topic}"])
    assert "batchnorm and none" in texts
    assert {arm for arm in ARMS if arm not in ("none", "batchnorm")} <= set(texts)


@pytest.mark.parametrize("topic", ["speed3", "cost1"])
def test_each_arm_has_its_row_and_number(pictures: dict[str, Picture], topic: str) -> None:
    texts = _texts(pictures[f"n1-{topic}"])
    assert set(ARMS) <= set(texts)
    assert "not reached" in texts or topic == "cost1"


def test_curves_are_drawn_in_the_colours_of_their_arms(pictures: dict[str, Picture]) -> None:
    """In seven arms' curves, batch normalization and none are in every panel, each other arm in its own."""
    svg = pictures["n1-speed1"].svg
    lines = re.findall(r'<path d="[^"]*"[^>]*style="fill: none; stroke[^"]*var\(--([a-z]+\d?)\)', svg)
    others = [arm for arm in ARMS if arm not in ("none", "batchnorm")]
    assert lines.count("subject") == 1 + len(others) + 1  # the wide panel, the small ones, the legend
    assert lines.count("baseline") == 1 + len(others) + 1
    for arm in others:
        assert lines.count(color_name(arm)) == 1, arm
    assert len(set(map(color_name, ARMS))) == len(ARMS)


def test_gradients_have_a_line_per_layer_in_the_colour_of_the_arm(
    pictures: dict[str, Picture], networks: tuple[Network, ...]
) -> None:
    layers = len(networks[1].runs[0].gradient_norm.layers)
    lines = re.findall(
        r'style="fill: none; stroke: var\(--(\w+)\); stroke-(?:opacity|width)', pictures["n1-gradients1"].svg
    )
    for arm, color in (("none", "baseline"), ("batchnorm", "subject")):
        assert lines.count(color) == layers, arm
    assert {"none", "batchnorm"} <= set(_texts(pictures["n1-gradients1"]))


def test_the_values_are_those_of_the_runs(
    pictures: dict[str, Picture], networks: tuple[Network, ...]
) -> None:
    """What a page draws anew and what a reader saves are each seed's own values."""
    network = networks[1]
    values = pictures["n1-speed1"].values
    assert values is not None
    curves = {curve.labels: (list(curve.x), list(curve.y)) for curve in values.curves}
    assert len(curves) == 2 * len(ARMS)
    for (arm, seed), (x, y) in curves.items():
        epochs = network.at_best(str(arm))[int(seed)].epochs
        assert x == [epoch.epoch for epoch in epochs]
        assert y == [epoch.test_accuracy for epoch in epochs]
    rows = pictures["n1-speed3"]
    assert rows.values is not None
    steps = {curve.labels: curve.y for curve in rows.values.curves}
    for arm in ARMS:
        for seed, run in network.at_best(arm).items():
            reached = not math.isnan(run.steps_to_target)
            assert steps.get((arm, seed)) == ([run.steps_to_target] if reached else None)


@pytest.mark.parametrize("topic", ["speed3", "accuracy1", "statistics1", "cost1"])
def test_each_mark_stands_for_a_curve_of_its_arm(pictures: dict[str, Picture], topic: str) -> None:
    picture = pictures[f"n1-{topic}"]
    assert picture.values is not None
    found = set()
    for mark in _root(picture).iter("g"):
        if places := mark.get("data-curves"):
            curves = [picture.values.curves[int(place)] for place in places.split(",")]
            found.update(curve.labels for curve in curves)
            assert len({curve.labels[0] for curve in curves}) == 1
            color = curves[0].style.color
            assert f"--{color})" in ElementTree.tostring(mark, encoding="unicode")
    assert found == {curve.labels for curve in picture.values.curves}


def test_descriptions_say_the_numbers(pictures: dict[str, Picture]) -> None:
    for picture in pictures.values():
        root = _root(picture)
        title, description = root[0], root[1]
        assert root.get("role") == "img"
        assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        assert title.text == picture.title
        assert description.text == picture.alt
        assert re.search(r"batchnorm[^;.]* (\d|–)", picture.alt), picture.alt
        assert "nan" not in picture.svg


def test_ids_do_not_collide_and_every_reference_is_met(tmp_path: Path, pictures: dict[str, Picture]) -> None:
    small = read(
        write(tmp_path, results([record(arm=arm) for arm in ("none", "batchnorm")])) / "results.json"
    )
    others = [_pictures(small.networks[0], prefix) for prefix in ("n2", "n3")]
    svgs = "".join(picture.svg for found in (pictures, *others) for picture in found.values())
    ids = re.findall(r'\bid="([^"]+)"', svgs)
    assert len(ids) == len(set(ids))
    referred = re.findall(r'href="#([^"]+)"', svgs) + re.findall(r"url\(#([^)]+)\)", svgs)
    assert referred
    assert set(referred) <= set(ids)


def test_pictures_bring_nothing_from_outside_and_no_colours_of_their_own(
    pictures: dict[str, Picture],
) -> None:
    for picture in pictures.values():
        assert "http" not in picture.svg
        assert "<style" not in picture.svg
        assert "<?xml" not in picture.svg
        assert "DejaVu" not in picture.svg
        assert "#10000" not in picture.svg
        assert "#000000" not in picture.svg


def test_drawing_is_deterministic_and_leaves_matplotlib_as_it_was(
    networks: tuple[Network, ...], pictures: dict[str, Picture]
) -> None:
    before = dict(matplotlib.rcParams)
    assert multiples.accuracy_curves("n1-speed1", networks[1]) == pictures["n1-speed1"]
    assert layers.input_drift("n1-drift1", networks[1]) == pictures["n1-drift1"]
    assert dict(matplotlib.rcParams) == before


def test_arms_far_apart_are_all_in_sight(tmp_path: Path) -> None:
    runs = [
        record(arm=arm, seed=seed, accuracy=accuracy)
        for arm, accuracy in (("batchnorm", 0.95), ("batchnorm+dropout", 0.75))
        for seed in range(2)
    ]
    (network,) = read(write(tmp_path, results(runs)) / "results.json").networks
    texts = _texts(_pictures(network)["n1-statistics1"])
    ticks = [float(text.removesuffix(" %")) for text in texts if re.fullmatch(r"[\d.]+ %", text)]
    assert min(ticks) <= 80
    assert max(ticks) >= 90


def test_names_are_text_and_nothing_else() -> None:
    name = '<script>alert("1")</script> $x^2$ \x00\ud800 漢字'
    picture = draw("k", name, name, 1.0, lambda figure: figure.text(0, 0.5, shown(name, 100)) and None)
    assert "<script" not in picture.svg
    assert '<script>alert("1")</script> $x^2$   漢字' in _texts(picture)
    assert "<text" in picture.svg


def test_long_names_are_shortened() -> None:
    assert shown("short") == "short"
    assert len(shown("x" * 500)) <= 22
    assert "\n" not in shown("a\nb")


@pytest.mark.parametrize(
    "runs",
    [
        [record(arm="batchnorm", epochs=1)],
        [record(arm="l1", diverged=True)],
        [record(arm=arm, seed=seed, diverged=True) for arm in ("none", "batchnorm") for seed in range(2)],
        [record(arm=arm, steps=None, accuracy=0.0) for arm in ("none", "batchnorm")],
        [record(arm="batchnorm", rate=rate) for rate in (1e-300, 1e-3, 1e30)],
        [record(arm="batchnorm", layers=1, gradient_ratio=0.0), record(arm="none", layers=1)],
        [record(arm="batchnorm", layers=40)],
    ],
    ids=["one-run", "diverged", "all-diverged", "nothing-learned", "far-rates", "one-layer", "many-layers"],
)
def test_whatever_was_run_can_be_drawn(tmp_path: Path, runs: list[dict[str, object]]) -> None:
    (network,) = read(write(tmp_path, results(runs)) / "results.json").networks
    for picture in _pictures(network).values():
        assert "nan" not in picture.svg
        _root(picture)
