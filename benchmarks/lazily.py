"""Functions of this package by their names, imported when needed: no measurement needs all packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def function(name: str) -> Callable[..., Any]:
    """Return the function that `module.function` names; modules of `benchmarks`, without its name."""
    module, _, attribute = name.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.{module}"), attribute)
    return found
