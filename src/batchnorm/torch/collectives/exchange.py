"""Runs the collectives of one process group in order, until one fails, and names the message of each.

A fingerprint of operation, shape and layer travels with each message, so that the message of a rank that
skipped a layer never pairs with those of the others.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from batchnorm.errors import RankError

from .lost_ranks import Board

Operation = Literal["gather", "add"]
_log = logging.getLogger("batchnorm")
_POLL_INTERVAL = 0.2  # seconds between two checks by the watching thread
_ALARM_DELAY = 0.2  # seconds of a collective after which that thread checks whether another rank's failed
_PENDING_FRACTION = 0.8  # of the timeout, after which messages that may not have arrived are logged
_FACTOR = 0x9E3779B97F  # odd, so that the last bits of its multiples differ, which float32 carries


class Fingerprint(NamedTuple):
    """Identifies a message: what is done with it, its shape, and the layer that sends it.

    Attributes:
        operation: the operation and what the packet looks like: "gather 2 x 64 float64".
        message: the operation and the layer.
        number: a hash of `message`, below 2⁴⁰.
    """

    operation: str
    message: str
    number: int

    def of_call(self, call: int) -> Fingerprint:
        """Return the fingerprint with the number of a call, which tells one layer's calls apart.

        Of two calls of a layer, one rank may run the first one's backward only, while others begin with that
        of the second.
        """
        number = (self.number + call * _FACTOR) % (1 << 40)
        operation, message = (f"{text} of call {call}" for text in (self.operation, self.message))
        return Fingerprint(operation, message, number)


@functools.lru_cache(maxsize=4096)
def fingerprint_of(label: str, operation: str, shape: torch.Size, dtype: torch.dtype) -> Fingerprint:
    """Return the fingerprint of a packet.

    Args:
        label: identifies the sender, such as `features.3 (BatchNorm2d) forward`.
        operation: "gather" or "add".
        shape: shape of the packet.
        dtype: dtype of the packet.
    """
    operation = f"{operation} {' x '.join(map(str, shape)) or '1'} {str(dtype).removeprefix('torch.')}"
    message = f"'{label}' ({operation})"
    digest = hashlib.blake2b(message.encode(), digest_size=5).digest()
    return Fingerprint(operation, message, int.from_bytes(digest))


class FingerprintMismatchError(RuntimeError):
    """A received message has another fingerprint than the one that this rank sends."""

    def __init__(self) -> None:
        super().__init__("a message of another layer came")


class Transport(Protocol):
    """Carries packets between the members of a group.

    Attributes:
        is_on_cpu: it carries tensors on CPUs only.
    """

    is_on_cpu: bool

    def gather(self, packet: Tensor, fingerprint: Fingerprint) -> Tensor:
        """Return every member's packet, `[size, *packet.shape]`, in the order of the members."""

    def add(self, packet: Tensor, fingerprint: Fingerprint) -> Tensor:
        """Return the sum of all packets."""

    def close(self) -> None:
        """Make all running collectives fail, in this process and in the other members."""

    def pending(self) -> str:
        """Return the messages that may not have arrived, if the host cannot know; else an empty string."""


class Exchange:
    """Collectives between the members of one group.

    Args:
        board: keys in the store, by which ranks meet and report failures.
        connect: makes the transport, once all members have come.
        timeout: seconds after which a collective fails.
    """

    def __init__(self, board: Board, connect: Callable[[], Transport], timeout: float) -> None:
        self._board, self._connect, self._timeout = board, connect, timeout
        self._transport: Transport | None = None
        self._failed: str | None = None
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._calls = itertools.count(1)
        self._thread = ThreadPoolExecutor(1, "batchnorm: exchanges")
        self._began: float | None = None  # set while a collective runs
        self._latest = time.monotonic()
        self._is_logged = True
        _start_watching(self)

    def next_call(self) -> int:
        """Return the number of the next call: the same on every rank, as long as no rank skips a call."""
        return next(self._calls)

    def run(self, operation: Operation, packet: Tensor, label: str, call: int = 0) -> Tensor:
        """Gather packets or add them.

        Args:
            operation: which of the two.
            packet: a tensor of the same shape on every rank.
            label: identifies the sender.
            call: the number of its call.

        Raises:
            RankError: a member is missing or sent something else, in this collective or in an earlier one.
        """
        if self._process != os.getpid():
            raise RankError(
                "statistics cannot be shared from a process that was forked off a rank of torch.distributed: "
                "initialize it in the process that runs the layer",
                layer=label,
            )
        fingerprint = fingerprint_of(label, operation, packet.shape, packet.dtype).of_call(call)
        with self._lock:
            if self._failed is not None:
                raise RankError(f"nothing is shared any more, since this failed: {self._failed}", layer=label)
            self._began = self._latest = time.monotonic()
            self._is_logged = False
            try:
                return self._collective(self._connected(), operation, packet, fingerprint)
            except BaseException as error:
                self._fail(error, label, fingerprint)
                raise
            finally:
                self._began = None

    def _connected(self) -> Transport:
        """Return the transport, which the first collective makes."""
        if self._transport is None:
            self._board.meet()
            self._transport = self._connect()
        return self._transport

    def _collective(
        self,
        transport: Transport,
        operation: Operation,
        packet: Tensor,
        fingerprint: Fingerprint,
    ) -> Tensor:
        """Run one collective, in a thread of its own if the host waits for the other ranks.

        Python handles Ctrl-C in the main thread, between two instructions of its own. While the main thread
        waits within torch's code, Ctrl-C would have no effect before the timeout.
        """
        collective = transport.gather if operation == "gather" else transport.add
        sent = packet.cpu() if transport.is_on_cpu else packet
        if not sent.is_cpu or threading.current_thread() is not threading.main_thread():
            return collective(sent, fingerprint).to(packet.device)
        return self._thread.submit(collective, sent, fingerprint).result().to(packet.device)

    def _fail(self, error: BaseException, label: str, fingerprint: Fingerprint) -> None:
        """Report the failure to the other ranks, stop all collectives, and raise an error with the reason."""
        self._failed = fingerprint.message
        self._board.post(fingerprint.message)
        if self._transport is not None:
            self._transport.close()
        if isinstance(error, Exception):  # the reason takes seconds to find, and Ctrl-C must not wait
            found = self._board.error(label, fingerprint.operation, fingerprint.message, error)
            self._failed = str(found)
            raise found from error

    def watch(self) -> None:
        """Stop a collective that waits in vain, and log messages that may not have arrived.

        The watching thread calls this again and again.
        """
        began, transport = self._began, self._transport
        now = time.monotonic()
        is_slow = began is not None and now - began > _ALARM_DELAY
        if is_slow and transport is not None and self._board.is_alarmed():
            transport.close()
        is_due = not self._is_logged and now - self._latest > _PENDING_FRACTION * self._timeout
        if transport is not None and is_due:
            self._is_logged = True
            if messages := transport.pending():
                _log.warning(
                    "nothing was shared for %.0f s. If the watchdog of torch.distributed ends this job for a "
                    "collective of batchnorm's group, its SeqNum is one of\n%s",
                    now - self._latest,
                    messages,
                )


def _start_watching(exchange: Exchange) -> None:
    """Start a thread that calls `watch` as long as the object exists.

    The thread ends before the interpreter does: a daemon thread that runs torch's code at that time would
    abort the process.
    """
    stop = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(weakref.ref(exchange), stop), daemon=True, name="batchnorm: other ranks"
    )
    weakref.finalize(exchange, _stop_watching, stop, thread)
    thread.start()


def _watch(reference: weakref.ref[Exchange], stop: threading.Event) -> None:
    """Call `watch` in intervals until the object is gone, or the store of torch.distributed is."""
    while not stop.wait(_POLL_INTERVAL):
        exchange = reference()
        if exchange is None:
            return
        try:
            exchange.watch()
        except RuntimeError:  # the store does not answer: running collectives fail by themselves
            return
        finally:
            del exchange


def _stop_watching(stop: threading.Event, thread: threading.Thread) -> None:
    """Stop the watching thread, and wait for it a short while."""
    stop.set()
    if thread is not threading.current_thread():
        thread.join(timeout=1.0)
