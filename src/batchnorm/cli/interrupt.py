"""Ctrl-C outside of a command's work, while its code is imported or it ends: one line, and no traceback."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def stop_at_once() -> None:
    """From now on, Ctrl-C ends the process with one line: nothing has begun that could be left half done."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup, for one, has it ignored
        signal.signal(signal.SIGINT, _stop)


@contextlib.contextmanager
def raising_interrupts() -> Iterator[None]:
    """Within this context, Ctrl-C is a KeyboardInterrupt again."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not _stop
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _stop)


def _stop(*_: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)
