"""Reads the options that no stock layer has from the signature of a constructor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_AS_STOCK = {"bias"}  # a stock layer can do without, too: its bias is then None


def keyword_options(constructor: Callable[..., None]) -> dict[str, Any]:
    """Return the keyword-only options of a constructor with their defaults, which compute what stock does."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in _AS_STOCK
    }
