"""A measurement that does what it is told, in a module that a new process soon has."""

from __future__ import annotations

import os
import time


def obeyed(what: str) -> dict[str, int]:
    """Return the number of its process, if it is not told to do something worse."""
    if what == "raise":
        raise ValueError("it is told to")
    if what == "sleep":
        time.sleep(600)
    if what == "die":
        os._exit(7)
    return {"process": os.getpid()}
