"""The report in a real browser: wide, narrow and dark; skipped where no browser is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

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
MEASURE = """<!DOCTYPE html><body style="margin:0">
<iframe id="frame" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<pre id="out"></pre><script>
onload = () => {{
  const page = document.getElementById("frame").contentDocument, out = {{}};
  const box = (element) => element.getBoundingClientRect();
  out.width = page.documentElement.clientWidth;
  out.scrollWidth = page.documentElement.scrollWidth;
  out.scrollHeight = page.documentElement.scrollHeight;
  const plots = [...page.querySelectorAll("svg.plot")];
  out.plots = plots.length;
  out.scale = Math.min(...plots.map((svg) => box(svg).width / svg.viewBox.baseVal.width));
  const texts = plots.flatMap((svg) => [...svg.querySelectorAll("text")]);
  const style = (element) => page.defaultView.getComputedStyle(element);
  out.fontSize = Math.min(...texts.map((text) => parseFloat(style(text).fontSize)));
  const isCut = (text) => box(text).left < -1 || box(text).right > out.width + 1;
  out.cut = texts.filter(isCut).map((text) => text.textContent);
  out.black = texts.filter((text) => style(text).fill === "rgb(0, 0, 0)").length;
  document.getElementById("out").textContent = JSON.stringify(out);
}};
</script>"""


def _browse(tmp_path: Path, *arguments: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout


def _measured(tmp_path: Path, report: Path, width: int) -> dict[str, Any]:
    wrapper = tmp_path / "wrapper.html"
    page = html.escape(report.read_text(encoding="utf-8"))
    wrapper.write_text(MEASURE.format(width=width, page=page), encoding="utf-8")
    document = _browse(tmp_path, f"--window-size={max(width, 800)},1000", "--dump-dom", wrapper.as_uri())
    found = re.search(r'<pre id="out">(.+?)</pre>', document)
    assert found, "the page did not load"
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long names in it, as a user's own may be."""
    content = usual(ARMS, seeds=2, networks=["deep"])
    name = "networks/" + "a_long_name_without_a_break_" * 4 + ".py:build"
    content["networks"][name] = content["networks"].pop("deep")
    for run in content["runs"]:
        run["network"] = name
    return write_report(write(tmp_path_factory.mktemp("report"), content))


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_the_page_never_scrolls_sideways(tmp_path: Path, report: Path, width: int) -> None:
    measured = _measured(tmp_path, report, width)
    assert measured["width"] == width
    assert measured["plots"] == 9
    assert measured["scrollWidth"] <= width
    assert measured["scrollHeight"] > 2000
    assert measured["cut"] == []
    assert measured["black"] == 0
    if width >= 390:
        assert measured["fontSize"] * measured["scale"] >= READABLE


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
