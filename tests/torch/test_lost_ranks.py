"""What ranks tell each other through a store: each rank is a thread here, the store is torch's."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch import distributed

from batchnorm.torch.collectives import exchange, lost_ranks
from batchnorm.torch.collectives.exchange import fingerprint_of
from batchnorm.torch.collectives.lost_ranks import Board, MeetingError

MINE = fingerprint_of("features.3 (BatchNorm2d) forward", "gather", torch.Size([2, 64]), torch.float64)
OTHER = fingerprint_of("features.4 (BatchNorm2d) forward", "gather", torch.Size([2, 64]), torch.float64)


class Clock:
    """Stands in for `time`: it goes on by what is slept, once something is so for all who sleep."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self.now, self._before = 0.0, before

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self._before()
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lost_ranks, "time", clock)
    return clock


def boards(number: int, timeout: float) -> list[Board]:
    """Return the board of each rank, on one store."""
    store = distributed.HashStore()
    everyone = tuple(range(number))
    return [Board(distributed.PrefixStore("group", store), everyone, rank, timeout) for rank in everyone]


def meet(some: list[Board]) -> None:
    """Let these ranks meet, and raise what one of them does."""
    with ThreadPoolExecutor(len(some)) as pool:
        list(pool.map(Board.meet, some))


def test_nobody_returns_from_a_meeting_before_the_last_of_many_has_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    *punctual, late = boards(20, math.inf)
    waiting: set[int] = set()
    known = threading.Event()  # that all wait, or that one does not

    def note() -> None:
        waiting.add(threading.get_ident())
        if len(waiting) == len(punctual):
            known.set()

    monkeypatch.setattr(lost_ranks, "time", Clock(note))
    with ThreadPoolExecutor(len(punctual)) as pool:
        meetings = [pool.submit(board.meet) for board in punctual]
        for meeting in meetings:
            meeting.add_done_callback(lambda _: known.set())
        known.wait()
        early = [meeting.done() for meeting in meetings]
        late.meet()
    assert not any(early)
    assert len(waiting) == len(punctual)
    assert [meeting.result() for meeting in meetings] == [None] * len(punctual)


def test_who_does_not_come_is_named_to_all_and_told_when_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    *punctual, late = boards(20, 0.2)
    # No time passes before all of them are there, however slow they are.
    there = [f"1/here/{rank}" for rank in range(len(punctual))]
    monkeypatch.setattr(lost_ranks, "time", Clock(lambda: late.store.wait(there, timedelta(seconds=600))))
    with ThreadPoolExecutor(len(punctual)) as pool:
        meetings = [pool.submit(board.meet) for board in punctual]
    for board, meeting in zip(punctual, meetings, strict=True):
        with pytest.raises(MeetingError, match=r"rank 19 did not come within 0\.2 s"):
            meeting.result()
        board.post(MINE.message)
    with pytest.raises(MeetingError, match="another rank gave up before this one came"):
        late.meet()


def test_a_second_meeting_on_a_store_is_not_held_with_those_of_the_first() -> None:
    store = distributed.HashStore()
    meet([Board(store, (0, 1), rank, 600.0) for rank in (0, 1)])
    second = [Board(store, (0, 1), rank, 0.2) for rank in (0, 1)]
    with pytest.raises(MeetingError, match="rank 1 did not come"):
        second[0].meet()


def test_an_error_names_all_who_are_silent_or_sent_something_else(clock: Clock) -> None:
    everyone = boards(30, 0.2)
    assert not everyone[0].is_alarmed()
    for rank in (0, 4, 7):
        everyone[rank].post(MINE.message if rank != 7 else OTHER.message)
    assert everyone[9].is_alarmed()
    cause = RuntimeError("[/a/pair.cc:5] Timed out. This is typically caused by x")
    error = everyone[0].error("features.3", MINE.operation, MINE.message, cause)
    assert lost_ranks._SOON <= clock.now < lost_ranks._SOON + 0.2
    assert str(error).startswith(
        "features.3: rank 0 could not share statistics (gather 2 x 64 float64): "
        "no sign of ranks 1, 2, 3, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18 and 11 more, "
        "which were killed, or are elsewhere and did not come within 0.2 s; "
        "rank 7 sent something else, 'features.4 (BatchNorm2d) forward' (gather 2 x 64 float64). These"
    )
    assert str(error).endswith("on every rank. Cause: Timed out")


def test_an_error_waits_no_longer_than_until_all_have_answered(clock: Clock) -> None:
    first, second = boards(2, 30.0)
    for board in (first, second):
        board.post(MINE.message)
    assert "this rank came too late, or a connection broke" in str(
        first.error("x", MINE.operation, MINE.message, RuntimeError("closed"))
    )
    assert clock.now == 0.0


def test_an_error_waits_for_an_answer_and_no_longer_than_a_short_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the timeout."""
    first, second, silent = boards(3, 600.0)
    clock = Clock(lambda: second.post(OTHER.message) if clock.now > 0.5 else None)
    monkeypatch.setattr(lost_ranks, "time", clock)
    first.post(MINE.message)
    error = str(first.error("x", MINE.operation, MINE.message, RuntimeError("closed")))
    assert "no sign of rank 2, which" in error
    assert "rank 1 sent something else" in error
    assert 0.5 + lost_ranks._SOON <= clock.now < 0.5 + lost_ranks._SOON + 0.4
    silent.post(MINE.message)
    clock.now = 0.0
    assert "no sign" not in str(first.error("x", MINE.operation, MINE.message, RuntimeError("closed")))
    assert clock.now == 0.0


class SilentTransport:
    """Its device does not say whether what was sent has arrived."""

    is_on_cpu = False

    def gather(self, packet: torch.Tensor, _: object) -> torch.Tensor:
        return packet[None]

    def pending(self) -> str:
        return "7: norm forward"


def test_what_may_not_have_arrived_is_logged_once_before_the_timeout(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exchange, "time", clock)
    monkeypatch.setattr(exchange, "_start_watching", lambda _: None)
    (board,) = boards(1, 10.0)
    shared = exchange.Exchange(board, SilentTransport, 10.0)
    for _ in range(2):  # once for each time that nothing follows
        shared.run("gather", torch.ones(2), "norm")
        clock.now += 7.9
        shared.watch()
        assert not caplog.messages
        for _ in range(2):
            clock.now += 0.2
            shared.watch()
        assert [text.partition(" s. ")[0] for text in caplog.messages] == ["nothing was shared for 8"]
        assert caplog.messages[0].endswith("7: norm forward")
        caplog.clear()
