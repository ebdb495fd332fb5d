"""Renders and writes pages of HTML by the templates of this package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batchnorm.errors import in_one_line
from batchnorm.files import write_whole


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
    environment.filters["drawing"] = lambda picture: Markup(picture.svg)  # escaped where it is drawn
    environment.filters["line"] = in_one_line
    environment.filters["code"] = code
    return environment.get_template(name).render(**values)


def write_html(path: Path, page: str) -> None:
    """Writes a page, in full or not at all.

    Raises:
        FileError: it cannot be written.
    """
    # A name may hold half a surrogate pair, which no file in UTF-8 can.
    write_whole(path, page.encode("utf-8", "replace").decode("utf-8"))
