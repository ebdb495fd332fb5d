"""Renders and writes pages of HTML by the templates of this package."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from batchnorm.errors import in_one_line
from batchnorm.files import write_whole

from .plots.canvas import Picture

_TEMPLATES = files("batchnorm.studies") / "templates"
# The library that draws charts, as its authors released it (uPlot.LICENSE), and the page's own script.
SCRIPTS = ("uPlot.iife.min.js", "report.js")


def render_template(name: str, *, code: Callable[[str], str] = str, **values: object) -> str:
    """Returns a page of HTML, in which every name and value is escaped.

    Args:
        name: of the template.
        code: makes text printable in the filter `code`.
        values: that the template shows.
    """
    environment = Environment(
        loader=PackageLoader("batchnorm.studies", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = _drawing
    environment.filters["line"] = in_one_line
    environment.filters["code"] = code
    environment.globals["policy"] = _policy()
    environment.globals["scripts"] = [Markup(_script(one)) for one in SCRIPTS]
    return environment.get_template(name).render(**values)


def write_html(path: Path, page: str) -> None:
    """Writes a page, in full or not at all.

    Raises:
        FileError: it cannot be written.
    """
    # A name may hold half a surrogate pair, which no file in UTF-8 can.
    write_whole(path, page.encode("utf-8", "replace").decode("utf-8"))


def frame(page: Path, height: int = 700) -> str:
    """Returns a page as a frame within a notebook."""
    source = Markup.escape(page.read_text(encoding="utf-8"))
    return f'<iframe srcdoc="{source}" width="100%" height="{height}" style="border: 0"></iframe>'


def _drawing(picture: Picture) -> Markup:
    """Returns a picture, escaped where it is drawn, and its values as JSON that no browser runs."""
    if picture.values is None:
        return Markup(picture.svg)
    dumps = functools.partial(json.dumps, separators=(",", ":"), ensure_ascii=True)
    values = htmlsafe_json_dumps(picture.values.content(), dumps=dumps)
    return Markup(picture.svg) + Markup('<script type="application/json">') + values + Markup("</script>")


@functools.cache
def _script(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


@functools.cache
def _policy() -> str:
    """Returns the policy of the page: it loads nothing, and runs the scripts of `SCRIPTS` alone, by hash."""
    hashes = [base64.b64encode(hashlib.sha256(_script(name).encode()).digest()).decode() for name in SCRIPTS]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"
