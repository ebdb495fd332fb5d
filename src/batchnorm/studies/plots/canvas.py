"""A figure drawn by matplotlib and turned into inline SVG that takes its colours and font from the page."""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from batchnorm.errors import OptionError
from batchnorm.files import write_whole
from batchnorm.studies.verdicts.results import BASELINE, SUBJECT, UNMASKED

from .values import Values

# Inches. As wide as a phone's screen less its margins: there, one point of text is about one pixel.
WIDTH = 4.2
FONT_SIZE = 9.0

# Stand-ins for colours: each becomes a variable to which the page gives a light and a dark value.
_NAMES = ("ink", "soft", "grid", "subject", "baseline", *(f"other{i}" for i in range(1, 9)))
_VARIABLES = {f"#1000{i:02}": f"var(--{name})" for i, name in enumerate(_NAMES, start=1)}
_STAND_INS = dict(zip(_NAMES, _VARIABLES, strict=True))
INK, SOFT, GRID, SUBJECT_COLOR, BASELINE_COLOR, OTHER_COLOR = list(_VARIABLES)[:6]

# Batch normalization and none have the colours that stand out most; each other arm has its own.
_COLORS = {
    SUBJECT: "subject",
    BASELINE: "baseline",
    "layernorm": "other1",
    "dropout": "other2",
    "batchnorm+dropout": "other3",
    "l2": "other4",
    UNMASKED: "other5",
    "l1": "other6",
    "groupnorm": "other7",
    "stock": "other8",
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with dollar signs is a name
    "text.usetex": False,
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",  # measures the layout; the page's own font, which is narrower, shows
    "font.size": FONT_SIZE,
    **dict.fromkeys(("axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"), FONT_SIZE),
    "axes.titlelocation": "left",
    **dict.fromkeys(("text.color", "axes.titlecolor"), INK),
    **dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), SOFT),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), SOFT),
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.major.size": 2.5,
    **dict.fromkeys(("ytick.major.size", "xtick.minor.size", "ytick.minor.size"), 0.0),
    "lines.linewidth": 1.4,
    "lines.markersize": 3.2,
}
_FONT = re.compile(r"(font-family: |px )'[^;]*")
_COLOR = re.compile(r"#1000\d\d")
_CURVES = "curves:"

Dash = Literal["-"] | tuple[float, Sequence[float]]  # of a line, as matplotlib takes it
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]+")


@dataclass(frozen=True)
class Picture:
    """One picture: its name, what it shows in words and numbers, and the SVG, safe to put into HTML.

    With its values the page can draw it anew, and save it.
    """

    key: str
    title: str
    alt: str
    svg: str
    values: Values | None = None


def draw(
    key: str,
    title: str,
    alt: str,
    height: float,
    paint: Callable[[Figure], None],
    *,
    width: float = WIDTH,
    values: Values | None = None,
) -> Picture:
    """Paints a figure and return it as a picture.

    Args:
        key: unique within the page; every id in the SVG starts with it.
        title: shown as the caption, and the accessible name.
        alt: the accessible description: what the picture shows, in numbers.
        height: inches.
        paint: draws on the empty figure.
        width: inches.
        values: what is drawn.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}), warnings.catch_warnings():
        # The page's fonts show what DejaVu Sans, which only measures, has no glyph for.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Picture(key, title, alt, _inline(buffer.getvalue(), key, title, alt), values)


def save(picture: Picture, path: Path) -> None:
    """Writes a picture to an SVG file of its own, with the report's colours, light and dark.

    Raises:
        OptionError: the name of the file does not end in .svg.
        FileError: it cannot be written.
    """
    if path.suffix.lower() != ".svg":
        raise OptionError(f"pictures are drawn as SVG: name a file that ends in .svg, not {path.name!r}")
    palette = files("batchnorm.studies").joinpath("templates/palette.css").read_text(encoding="utf-8")
    style = f"<style>{palette}svg {{ background: var(--page); }}</style>"
    opening, rest = picture.svg.split(">", 1)
    opening = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    write_whole(path, f"{opening}>{style}{rest}\n")


def shown(name: str, limit: int = 22) -> str:
    """Returns a name as it fits into a picture: in one line, shortened in the middle."""
    text = _CONTROL.sub(" ", name)
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-(limit // 2 - 1) :]}"


def color_name(arm: str) -> str:
    """Returns the name of the colour that stands for an arm throughout a report."""
    return _COLORS.get(arm) or f"other{1 + zlib.crc32(arm.encode('utf-8', 'replace')) % 8}"


def color_of(arm: str) -> str:
    """Returns the colour that stands for an arm throughout a report."""
    return color_named(color_name(arm))


def color_named(name: str) -> str:
    """Returns the stand-in of a colour of the page, such as `subject`."""
    return _STAND_INS[name]


def of_curves(places: Iterable[int]) -> str:
    """Returns the group id of a mark that stands for curves of the picture's values, by their places."""
    return _CURVES + ",".join(map(str, places))


def ticks(axis: Axis, most: int, show: str | Callable[[float], str], **places: Any) -> None:
    """Puts at most so many ticks on an axis.

    Args:
        axis: of a plot.
        most: how many spaces between ticks there may be.
        show: how a number is written: a function, or a format of `x`.
        places: of `MaxNLocator`: `integer` or `steps`.
    """
    axis.set_major_locator(MaxNLocator(most, **places))
    axis.set_major_formatter(show if isinstance(show, str) else FuncFormatter(lambda x, _: show(x)))


def legend(figure: Figure, lines: Sequence[Line2D], columns: int, length: float) -> None:
    """Names lines above a figure, each behind a piece of it as long as `length` letters."""
    layout = {"ncols": columns, "handlelength": length, "columnspacing": 1.2}
    figure.legend(handles=lines, loc="outside upper left", frameon=False, **layout)


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
    labels = f"{key}-title {key}-desc"
    view = f"0 0 {width:g} {height:g}"
    root.attrib.update({"viewBox": view, "role": "img", "aria-labelledby": labels, "class": "plot"})
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
        if name.startswith(_CURVES):
            attributes["data-curves"] = name.removeprefix(_CURVES)
    if "href" in attributes:
        attributes["href"] = f"#{key}-{attributes['href'][1:]}"
    if "clip-path" in attributes:
        attributes["clip-path"] = _REFERENCE.sub(rf"url(#{key}-\1)", attributes["clip-path"])
    if "d" in attributes:
        attributes["d"] = " ".join(attributes["d"].split())
    if "style" in attributes:
        style = _FONT.sub(r"\1var(--sans)", attributes["style"])
        attributes["style"] = _COLOR.sub(lambda match: _VARIABLES[match.group()], style)
