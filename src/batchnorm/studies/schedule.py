"""Says when to write a report of what is there, while the work that it is about goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_SECONDS = 30.0  # between reports, at least
_TIMES = 20  # as long as a report takes is worked before the next: reports take a twentieth of the time

_T = TypeVar("_T")


class ReportSchedule:
    """Writes reports every half minute, or less often where they take long."""

    def __init__(self) -> None:
        self._due = time.monotonic() + _SECONDS

    def write_if_due(self, write: Callable[[], _T]) -> _T | None:
        """Returns what `write` does, if it is time for it, else None."""
        began = time.monotonic()
        if began <= self._due:
            return None
        done = write()
        now = time.monotonic()
        self._due = now + max(_SECONDS, _TIMES * (now - began))
        return done
