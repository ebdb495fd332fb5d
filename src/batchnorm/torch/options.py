"""The options of our layers that no stock layer has, derived from the constructor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_AS_STOCK = {"bias"}  # a stock layer without it is one whose bias is None


def keyword_options(constructor: Callable[..., None]) -> dict[str, Any]:
    """Return the keyword-only options of a constructor, each with the value of a stock layer."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in _AS_STOCK
    }
