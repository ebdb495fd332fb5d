"""Messages of Gloo among more members than a test has processes: each is a thread, its connections real."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from batchnorm.torch.collectives.exchange import FingerprintMismatchError, fingerprint_of
from batchnorm.torch.collectives.gloo_transport import GlooTransport

MINE = fingerprint_of("layer", "gather", torch.Size([7]), torch.float64)
OTHER = fingerprint_of("other", "gather", torch.Size([7]), torch.float64)
TIMEOUT = 300.0


def by_members(size: int, act: Callable[[GlooTransport], Any]) -> list[Any]:
    """Connect members and return, of each, what `act` returns of its connections, or the error raised."""
    store = distributed.HashStore()

    def member(index: int) -> Any:
        transport = GlooTransport(store, index, size, timeout=TIMEOUT)
        try:
            return act(transport)
        except RuntimeError as error:
            transport.close()
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(member, range(size)))


def packet_of(index: int) -> Tensor:
    """Return what a member sends: sums of these round, so that the order in which they are added shows."""
    return torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(index))


@pytest.mark.parametrize("size", range(2, 10))
def test_any_number_of_members(size: int) -> None:
    """Twice in a row, so that no message of the first time is taken for one of the second."""
    packets = torch.stack([packet_of(index) for index in range(size)])

    def act(transport: GlooTransport) -> list[Tensor]:
        packet = packets[transport.index].clone()
        found = [transport.gather(packet, MINE), transport.add(packet, MINE)]
        found += [transport.gather(-packet, MINE), transport.add(-packet, MINE)]
        assert torch.equal(packet, packets[transport.index])
        return found

    found = by_members(size, act)
    for gathered, total, negative, negative_total in found:
        assert torch.equal(gathered, packets)
        torch.testing.assert_close(total, packets.sum(0), rtol=0, atol=1e-14)
        assert torch.equal(total, found[0][1])
        assert torch.equal(negative, -packets)
        assert torch.equal(negative_total, -total)


@pytest.mark.parametrize("act", ["gather", "add"])
@pytest.mark.parametrize("size", [2, 5, 8])
def test_no_member_gets_a_result_if_one_sends_another_message(size: int, act: str) -> None:
    def share(transport: GlooTransport) -> Tensor:
        fingerprint = OTHER if transport.index == size - 1 else MINE
        shared: Tensor = getattr(transport, act)(packet_of(transport.index), fingerprint)
        return shared

    found = by_members(size, share)
    assert all(isinstance(error, RuntimeError) for error in found), found
    assert any(isinstance(error, FingerprintMismatchError) for error in found)


class Told:
    """A backend that tells when it is about to wait for member 1."""

    def __init__(self, backend: Any, waits: threading.Event) -> None:
        self._backend, self._waits = backend, waits

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Any:
        return self._begun(to, self._backend.send(tensors, to, tag))

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Any:
        return self._begun(source, self._backend.recv(tensors, source, tag))

    def _begun(self, index: int, work: Any) -> Any:
        if index == 1:
            self._waits.set()
        return work


def test_one_who_waits_is_let_go_from_another_thread_and_from_the_other_end() -> None:
    """Members 0 and 2 wait for 1, which does not answer. 2 hangs up itself; then 1 does, and lets 0 go."""
    waits = {0: threading.Event(), 2: threading.Event()}
    is_2_gone = threading.Event()

    def seconds_until_let_go(transport: GlooTransport) -> float:
        transport._backend = Told(transport._backend, waits[transport.index])
        began = time.monotonic()
        with pytest.raises(RuntimeError):
            transport.gather(packet_of(transport.index), MINE)
        return time.monotonic() - began

    def act(transport: GlooTransport) -> float:
        if transport.index == 0:
            return seconds_until_let_go(transport)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(seconds_until_let_go, transport) if transport.index == 2 else None
            for event in (*waits.values(), *(() if waiting else (is_2_gone,))):
                assert event.wait(TIMEOUT)
            transport.close()
            found = waiting.result() if waiting else 0.0
            is_2_gone.set()
            return found

    assert all(seconds < TIMEOUT / 2 for seconds in by_members(3, act))
