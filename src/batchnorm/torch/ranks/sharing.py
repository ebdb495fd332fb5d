"""What the members of a group share: exchanges, one after the other, until one fails."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol

from torch import Tensor

from batchnorm.errors import RankError

from .lost_ranks import Board
from .messages import Mark, mark_of

_log = logging.getLogger("batchnorm")
_LOOKS = 0.2  # seconds between two looks after an exchange
_PATIENCE = 0.2  # seconds of an exchange before the other thread asks whether another rank's failed
_OVERDUE = 0.8  # of the timeout


class Wire(Protocol):
    """Connections between the members, whatever they are made of.

    Attributes:
        is_on_cpu: it carries tensors on CPUs only.
    """

    is_on_cpu: bool

    def gather(self, packet: Tensor, mark: Mark) -> Tensor:
        """Return every member's packet, `[size, *packet.shape]`, in order."""

    def add(self, packet: Tensor, mark: Mark) -> Tensor:
        """Return the sum of all packets."""

    def hang_up(self) -> None:
        """Make all exchanges fail that are going on, here and at the other ends."""

    def overdue(self) -> str:
        """Return what may have been sent and not received, where the host does not know; else nothing."""


class Sharing:
    """Exchanges between the members of one group.

    Args:
        board: where ranks meet, and tell each other what went wrong.
        connect: makes the connections, when all members have come.
        timeout: seconds after which an exchange fails.
    """

    def __init__(self, board: Board, connect: Callable[[], Wire], timeout: float) -> None:
        self._board, self._connect, self._timeout = board, connect, timeout
        self._wire: Wire | None = None
        self._failed: str | None = None
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._calls = itertools.count(1)
        self._thread = ThreadPoolExecutor(1, "batchnorm: exchanges")
        self._began: float | None = None  # while an exchange is going on
        self._latest = time.monotonic()
        self._is_logged = True
        _look_after(self)

    def next_call(self) -> int:
        """Return the number of a call that begins: the same on every rank, as long as none skips one."""
        return next(self._calls)

    def exchange(self, act: Literal["gather", "add"], packet: Tensor, label: str, call: int = 0) -> Tensor:
        """Gather packets or add them.

        Args:
            act: which of both.
            packet: of the same shape on every rank.
            label: what identifies the sender.
            call: the number of its call.

        Raises:
            RankError: a member is missing, or sent something else; or that was so before.
        """
        if self._process != os.getpid():
            raise RankError(
                "statistics cannot be shared from a process that was forked off a rank of torch.distributed: "
                "initialize it in the process that runs the layer",
                layer=label,
            )
        mark = mark_of(label, act, packet.shape, packet.dtype).of_call(call)
        with self._lock:
            if self._failed is not None:
                raise RankError(f"nothing is shared any more, since this failed: {self._failed}", layer=label)
            self._began = self._latest = time.monotonic()
            self._is_logged = False
            try:
                return self._exchange(self._connected(), act, packet, mark)
            except BaseException as error:
                self._fail(error, label, mark)
                raise
            finally:
                self._began = None

    def _connected(self) -> Wire:
        if self._wire is None:
            self._board.meet()
            self._wire = self._connect()
        return self._wire

    def _exchange(self, wire: Wire, act: Literal["gather", "add"], packet: Tensor, mark: Mark) -> Tensor:
        """Exchange; where the host waits for the other ranks, in a thread.

        Python's handler of Ctrl-C runs in the main thread, between two of its own instructions: while it
        waits within torch's code, not before the timeout.
        """
        exchange = wire.gather if act == "gather" else wire.add
        sent = packet.cpu() if wire.is_on_cpu else packet
        if not sent.is_cpu or threading.current_thread() is not threading.main_thread():
            return exchange(sent, mark).to(packet.device)
        return self._thread.submit(exchange, sent, mark).result().to(packet.device)

    def _fail(self, error: BaseException, label: str, mark: Mark) -> None:
        """Let the others know, stop all exchanges, and raise what is known of the reason."""
        self._failed = mark.sent
        self._board.post(mark.sent)
        if self._wire is not None:
            self._wire.hang_up()
        if isinstance(error, Exception):  # others, such as KeyboardInterrupt, are in a hurry
            found = self._board.error(label, mark, error)
            self._failed = str(found)
            raise found from error

    def look(self) -> None:
        """Look, from another thread, whether an exchange waits in vain."""
        began, wire = self._began, self._wire
        now = time.monotonic()
        if began is not None and wire is not None and now - began > _PATIENCE and self._board.is_alarmed():
            wire.hang_up()
        if wire is not None and not self._is_logged and now - self._latest > _OVERDUE * self._timeout:
            self._is_logged = True
            if sent := wire.overdue():
                _log.warning(
                    "nothing was shared for %.0f s. If the watchdog of torch.distributed ends this job for a "
                    "collective of batchnorm's group, its SeqNum is one of\n%s",
                    now - self._latest,
                    sent,
                )


def _look_after(sharing: Sharing) -> None:
    """Let a thread call `look` for as long as the object is there.

    It ends before the interpreter does: a daemon that is in torch's code by then would abort the process.
    """
    stop = threading.Event()
    thread = threading.Thread(
        target=_look, args=(weakref.ref(sharing), stop), daemon=True, name="batchnorm: other ranks"
    )
    weakref.finalize(sharing, _end, stop, thread)
    thread.start()


def _look(reference: weakref.ref[Sharing], stop: threading.Event) -> None:
    while not stop.wait(_LOOKS):
        sharing = reference()
        if sharing is None:
            return
        try:
            sharing.look()
        except RuntimeError:  # of the store: whoever waits is told by the connections
            return
        finally:
            del sharing


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(timeout=1.0)
