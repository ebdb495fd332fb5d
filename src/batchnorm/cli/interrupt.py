"""Ends the process on Ctrl-C with one line, and no traceback, while a command's code is imported or ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def stop_at_once() -> None:
    """Let Ctrl-C end the process with one line from now on: no work has begun that could stay half done."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup, for one, has it ignored
        signal.signal(signal.SIGINT, _stop)


@contextlib.contextmanager
def raising_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt again, within this context."""
    is_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    is_ours = is_main and signal.getsignal(signal.SIGINT) is _stop
    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, _stop)


def _stop(*_: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)
