"""Measurements behind the figures in README and docs; `make bench` runs them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("batchnorm") is None:  # a checkout on a machine where nothing can be installed
    sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
