"""A figure drawn by matplotlib and turned into inline SVG that takes its colours and font from the page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchnorm.errors import OptionError
from batchnorm.files import write_whole

# Inches. As wide as a phone's screen less its margins: there, one point of text is about one pixel.
WIDTH = 4.2
FONT_SIZE = 9.0

# Stand-ins for colours: each becomes a variable to which the page gives a light and a dark value.
INK, SOFT, GRID = "#100001", "#100002", "#100003"
SUBJECT_COLOR, BASELINE_COLOR, OTHER_COLOR = "#100004", "#100005", "#100006"
_VARIABLES = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    GRID: "var(--grid)",
    SUBJECT_COLOR: "var(--subject)",
    BASELINE_COLOR: "var(--baseline)",
    OTHER_COLOR: "var(--other)",
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with dollar signs is a name
    "text.usetex": False,
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",  # measures the layout; the page's own font, which is narrower, shows
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.2,
}
_FONT = re.compile(r"(font-family: |px )'[^;]*")
_COLOR = re.compile(r"#10000[1-6]")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]+")


@dataclass(frozen=True)
class Picture:
    """One picture: its name, what it shows in words and numbers, and the SVG, safe to put into HTML."""

    key: str
    title: str
    alt: str
    svg: str


def draw(
    key: str, title: str, alt: str, height: float, paint: Callable[[Figure], None], *, width: float = WIDTH
) -> Picture:
    """Paint a figure and return it as a picture.

    Args:
        key: unique within the page; every id in the SVG starts with it.
        title: shown as the caption, and the accessible name.
        alt: the accessible description: what the picture shows, in numbers.
        height: inches.
        paint: draws on the empty figure.
        width: inches.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}), warnings.catch_warnings():
        # The page's fonts show what DejaVu Sans, which only measures, has no glyph for.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Picture(key, title, alt, _inline(buffer.getvalue(), key, title, alt))


def save(picture: Picture, path: Path) -> None:
    """Write a picture to an SVG file of its own, with the report's colours, light and dark.

    Raises:
        OptionError: the name of the file does not end in .svg.
        FileError: it cannot be written.
    """
    if path.suffix.lower() != ".svg":
        raise OptionError(f"pictures are drawn as SVG: name a file that ends in .svg, not {path.name!r}")
    palette = files("batchnorm.study").joinpath("templates/palette.css").read_text(encoding="utf-8")
    style = f"<style>{palette}svg {{ background: var(--page); }}</style>"
    opening, rest = picture.svg.split(">", 1)
    opening = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    write_whole(path, f"{opening}>{style}{rest}\n")


def shown(name: str, limit: int = 22) -> str:
    """A name as it fits into a picture: in one line, shortened in the middle."""
    text = _CONTROL.sub(" ", name)
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-(limit // 2 - 1) :]}"


def labelled(axes: Axes, *, x: str = "", y: str = "") -> None:
    """Name the axes; the vertical name stands level at the top, where it can be read."""
    axes.set_xlabel(x, loc="right")
    if y:
        axes.set_title(y, color=SOFT)


def _inline(svg: str, key: str, title: str, alt: str) -> str:
    root = ElementTree.fromstring(svg)
    _bare_names(root)
    width, height = (float(size) for size in root.attrib["viewBox"].split()[2:])
    used = {element.attrib["href"][1:] for element in root.iter() if "href" in element.attrib}
    for element in root.iter():
        used.update(_REFERENCE.findall(element.attrib.get("clip-path", "")))
    for element in root.iter():
        _restyle(element, key, used)
    for defs in root.findall("defs"):  # matplotlib's stylesheet, which would reach the whole page
        for style in defs.findall("style"):
            defs.remove(style)
    root.attrib.clear()
    root.attrib.update(
        {
            "viewBox": f"0 0 {width:g} {height:g}",
            "role": "img",
            "aria-labelledby": f"{key}-title {key}-desc",
            "class": "plot",
        }
    )
    for place, (tag, text) in enumerate((("title", title), ("desc", alt))):
        element = ElementTree.Element(tag, {"id": f"{key}-{tag}"})
        element.text = _CONTROL.sub(" ", text)
        root.insert(place, element)
    for element in root.iter():
        if element.tag not in ("text", "tspan", "title", "desc"):
            element.text = None
        element.tail = None
    return ElementTree.tostring(root, encoding="unicode")


def _bare_names(root: ElementTree.Element) -> None:
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in [name for name in element.attrib if "}" in name]:
            element.attrib[name.rpartition("}")[2]] = element.attrib.pop(name)


def _restyle(element: ElementTree.Element, key: str, used: set[str]) -> None:
    attributes = element.attrib
    if "id" in attributes:
        name = attributes.pop("id")
        if name in used:
            attributes["id"] = f"{key}-{name}"
    if "href" in attributes:
        attributes["href"] = f"#{key}-{attributes['href'][1:]}"
    if "clip-path" in attributes:
        attributes["clip-path"] = _REFERENCE.sub(rf"url(#{key}-\1)", attributes["clip-path"])
    if "d" in attributes:
        attributes["d"] = " ".join(attributes["d"].split())
    if "style" in attributes:
        style = _FONT.sub(r"\1var(--sans)", attributes["style"])
        attributes["style"] = _COLOR.sub(lambda match: _VARIABLES[match.group()], style)
