"""The report in a real browser: wide, narrow and dark; skipped where no browser is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image

from batchnorm.studies.report import write_report
from tests.study.results_fixture import ARMS, usual, write

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars"),
)
# Pixels below which text in a picture is hard to read on a phone.
READABLE = 9.0

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH"
)

# A frame of exact width stands in for the window: browsers do not make windows as narrow as a phone.
FRAME = """<!DOCTYPE html><body style="margin:0">
<iframe id="frame" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<pre id="out"></pre><script>{script}</script>"""
MEASURE = """
onload = () => {
  const page = document.getElementById("frame").contentDocument, out = {};
  const box = (element) => element.getBoundingClientRect();
  out.width = page.documentElement.clientWidth;
  out.scrollWidth = page.documentElement.scrollWidth;
  out.scrollHeight = page.documentElement.scrollHeight;
  const plots = [...page.querySelectorAll("svg.plot")].filter((svg) => box(svg).width);
  out.plots = plots.length;
  out.charts = page.querySelectorAll(".uplot").length;
  out.scale = Math.min(...plots.map((svg) => box(svg).width / svg.viewBox.baseVal.width));
  const texts = plots.flatMap((svg) => [...svg.querySelectorAll("text")]);
  const style = (element) => page.defaultView.getComputedStyle(element);
  out.fontSize = Math.min(...texts.map((text) => parseFloat(style(text).fontSize)));
  const isCut = (text) => box(text).left < -1 || box(text).right > out.width + 1;
  out.cut = texts.filter(isCut).map((text) => text.textContent);
  out.black = texts.filter((text) => style(text).fill === "rgb(0, 0, 0)").length;
  document.getElementById("out").textContent = JSON.stringify(out);
};
"""
# A reader who hides an arm, moves the pointer to the second epoch, sorts a table, and hides a seed.
ACT = """
onload = () => setTimeout(() => {
  const frame = document.getElementById("frame"), page = frame.contentDocument, out = {};
  const figure = page.getElementById("n1-speed1"), legend = [...figure.querySelectorAll(".legend button")];
  const pressed = () => legend.map((button) => button.getAttribute("aria-pressed")).join(" ");
  const text = () => page.getElementById("tip").innerText;
  const point = (epoch) => {
    const over = figure.querySelector(".u-over"), box = over.getBoundingClientRect();
    const place = { clientX: box.left + (box.width * (epoch - 1)) / 3, clientY: box.top + 9, bubbles: true };
    over.dispatchEvent(new frame.contentWindow.MouseEvent("mousemove", place));
  };
  const later = (act) => new Promise((done) => setTimeout(() => done(act()), 150));
  out.strange = frame.contentWindow.strange === undefined ? "blocked" : "run";
  out.names = legend.map((button) => button.textContent);
  out.static = frame.contentWindow.getComputedStyle(figure.querySelector("svg.plot")).display;
  out.charts = page.querySelectorAll(".uplot").length;
  point(2);
  later(() => (out.told = text())).then(() => {
    legend[1].dispatchEvent(new Event("pointerenter"));
    const lit = [...page.querySelectorAll(".legend .lit")].map((button) => button.textContent);
    out.lit = [...new Set(lit)];
    out.litFigures = lit.length;
    out.litRows = [...page.querySelectorAll("tr.lit")].map((row) => row.cells[0].textContent);
    out.dim = page.querySelectorAll("#n1-speed3 .dim").length > 0;
    legend[1].dispatchEvent(new Event("pointerleave"));
    out.left = page.querySelectorAll(".lit, .dim").length;
    const dot = page.querySelector("#n1-speed3 svg [data-curves='2,3'] use");
    const at = { clientX: 9, clientY: 9, bubbles: true };
    dot.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
    out.dot = text();
    dot.dispatchEvent(new frame.contentWindow.PointerEvent("pointerleave"));
    const scale = page.querySelector("#n1-speed2 .buttons button"), before = scale.textContent;
    scale.click();
    out.scale = [before, scale.textContent, page.querySelectorAll("#n1-speed2 .uplot").length];
    legend[out.names.indexOf("none")].click();
    out.pressed = pressed();
    out.everywhere = page.querySelectorAll(".legend [aria-pressed=false]").length;
    return later(() => point(2));
  }).then(() => later(() => (out.without = text()))).then(() => {
    page.querySelector(".seeds button").click();
    return later(() => point(2));
  }).then(() => later(() => (out.oneSeed = text()))).then(() => {
    const table = page.querySelector("table.numbers");
    table.tHead.rows[0].cells[2].querySelector("button").click();
    out.sorted = [...table.tBodies[0].rows].map((row) => row.cells[2].textContent);
    const saved = [];
    const link = frame.contentWindow.HTMLAnchorElement.prototype;
    link.click = function () { saved.push([this.download, this.href]); };
    [...figure.querySelectorAll(".buttons button")].slice(1).forEach((button) => button.click());
    page.querySelector("#n1-speed3 .buttons button:last-child").click();
    return later(() => (out.saved = saved));
  }).catch((error) => { out.error = String(error); }).then(() => {
    document.getElementById("out").textContent = JSON.stringify(out);
  });
}, 100);
"""


def _browse(tmp_path: Path, *arguments: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout


def _in_frame(tmp_path: Path, page: str, width: int, script: str) -> dict[str, Any]:
    """Returns what a script finds in a page, in a frame of so many pixels."""
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(FRAME.format(width=width, page=html.escape(page), script=script), encoding="utf-8")
    window = f"--window-size={max(width, 800)},1000"
    document = _browse(tmp_path, window, "--virtual-time-budget=10000", "--dump-dom", wrapper.as_uri())
    found = re.search(r'<pre id="out">(.+?)</pre>', document, re.DOTALL)
    assert found, "the page did not load"
    content: dict[str, Any] = json.loads(html.unescape(found[1]))
    return content


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long names in it, as a user's own may be."""
    content = usual(ARMS, seeds=2, networks=["deep"])
    name = "networks/" + "a_long_name_without_a_break_" * 4 + ".py:build"
    content["networks"][name] = content["networks"].pop("deep")
    for run in content["runs"]:
        run["network"] = name
    return write_report(write(tmp_path_factory.mktemp("report"), content))


@pytest.mark.parametrize(("width", "has_scripts"), [(1280, True), (390, True), (320, True), (390, False)])
def test_the_page_never_scrolls_sideways(tmp_path: Path, report: Path, width: int, has_scripts: bool) -> None:
    page = report.read_text(encoding="utf-8")
    measured = _in_frame(tmp_path, page if has_scripts else _without_scripts(page), width, MEASURE)
    assert measured["width"] == width
    assert measured["plots"] == (4 if has_scripts else 9)
    assert measured["charts"] == (3 + 2 + 3 if has_scripts else 0)  # two arms' gradients, three layers
    assert measured["scrollWidth"] <= width
    assert measured["scrollHeight"] > 2000
    assert measured["cut"] == []
    assert measured["black"] == 0
    if width >= 390:
        assert measured["fontSize"] * measured["scale"] >= READABLE


def _without_scripts(page: str) -> str:
    return re.sub(r"script-src [^;]*;", "", page)  # where nothing is allowed, nothing runs


def _is_best(content: dict[str, Any], run: dict[str, Any], arm: str) -> bool:
    best = content["networks"]["mlp"][arm]["best_learning_rate"]
    return bool(run["arm"] == arm and run["learning_rate"] == best)


def test_arms_and_seeds_are_chosen_and_values_are_told_and_saved(tmp_path: Path) -> None:
    content = usual(["none", "batchnorm", "l1"], seeds=2, networks=["mlp"])
    page = write_report(write(tmp_path, content)).read_text(encoding="utf-8")
    page = page.replace("</body>", "<script>window.strange = 1</script></body>")
    found = _in_frame(tmp_path, page, 1280, ACT)
    assert "error" not in found, found
    assert found["strange"] == "blocked"
    assert found["names"] == ["none", "batchnorm", "l1"]
    assert found["static"] == "none"

    accuracy: dict[str, list[float]] = {arm: [] for arm in found["names"]}
    best = {arm: content["networks"]["mlp"][arm]["best_learning_rate"] for arm in accuracy}
    for run in content["runs"]:
        if run["learning_rate"] == best[run["arm"]]:
            accuracy[run["arm"]].append(run["epochs"][1]["test_accuracy"])

    def told(arm: str, values: list[float]) -> str:
        return f"{arm} {100 * sum(values) / len(values):.2f}".rstrip("0").rstrip(".") + " %"

    lines = found["told"].replace("\n", " ")
    assert lines.startswith("epoch 2")
    for arm, values in accuracy.items():
        assert told(arm, values) in lines
    # Pointing at an arm highlights it in every picture and table that has it, and dims the others.
    assert found["lit"] == found["litRows"] == ["batchnorm"]
    assert found["litFigures"] == 7
    assert found["dim"]
    assert found["left"] == 0
    steps = [run["steps_to_target"] for run in content["runs"] if _is_best(content, run, "batchnorm")]
    assert found["dot"].replace("\n", " ").startswith("training steps")
    assert f"batchnorm, seed 0 {steps[0]:g}" in found["dot"].replace("\n", " ")
    assert sorted(found["scale"][:2]) == ["Linear", "Log"]
    assert found["scale"][2] == 1
    assert found["pressed"] == "false true true"
    assert found["everywhere"] == 7  # of nine pictures, one shows layers, and one batchnorm alone
    assert "none" not in found["without"]
    assert told("l1", accuracy["l1"]) in found["without"].replace("\n", " ")
    assert told("l1", accuracy["l1"][1:]) in found["oneSeed"].replace("\n", " ")
    assert found["sorted"] == sorted(found["sorted"])
    (table, values), (as_json, _), (picture, image), (drawing, drawn) = found["saved"]
    assert drawing == "n1-speed3.png"
    assert len(drawn) > 10_000
    assert (table, as_json, picture) == ("n1-speed1.csv", "n1-speed1.json", "n1-speed1.png")
    rows = unquote(values).partition(",")[2].splitlines()
    assert rows[0] == '"arm","seed","epoch","held-out accuracy"'
    assert len(rows) == 1 + 3 * 2 * 4
    assert image.startswith("data:image/png;base64,")
    assert len(image) > 10_000


def test_the_page_shows_in_light_and_in_dark(tmp_path: Path, report: Path) -> None:
    corners = {}
    for scheme, setting in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{scheme}.png"
        _browse(
            tmp_path,
            f"--blink-settings=preferredColorScheme={setting}",
            "--window-size=1280,3000",
            f"--screenshot={picture}",
            report.as_uri(),
        )
        with Image.open(picture) as shot:
            gray = shot.convert("L")
        corners[scheme] = gray.getpixel((2, 2))
        lower = gray.crop((0, gray.height // 2, gray.width, gray.height))
        darkest, brightest = lower.getextrema()
        assert brightest - darkest > 150, f"{scheme}: nothing to be seen"
    assert corners["light"] > 240
    assert corners["dark"] < 40
