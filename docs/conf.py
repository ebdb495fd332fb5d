"""Builds the documentation site with Sphinx: `make docs`, into build/docs. Pages can be read offline."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "site"))

import batchnorm

project = "batchnorm"
author = "The batchnorm authors"
release = version = batchnorm.__version__
html_title = f"batchnorm {release}"
html_theme = "furo"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_extra_path = ["llms.txt"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",  # these three are in docs/site
    "mathml",
    "repository_pages",
]
exclude_patterns = ["site"]
suppress_warnings = ["myst.strikethrough"]
# `calibrate` in a docstring becomes a link where it is a public name, and code where it is not.
default_role = "py:obj"

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath", "attrs_inline"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes as a list: their types are in the signature
napoleon_custom_sections = [("Call arguments", "params_style")]
