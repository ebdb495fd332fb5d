"""Who is missing: ranks tell each other through the store of torch.distributed, once something went wrong.

A rank whose exchange failed writes what it sent. Whoever waits in the same exchange sees that, stops waiting,
and writes what it sent; who writes nothing within a short while is not there. While all goes well nothing is
written or read, but for the meeting when a group is made.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from typing import Any

from torch import distributed

from batchnorm.errors import RankError

from .messages import Mark

_SOON = (
    0.8  # seconds after the latest answer, in which a rank that waits answers: it looks often for an alarm
)
_NAMED = 16  # ranks that a message names
_REMEDY = (
    "These ranks share nothing from here on: restart the job, or call destroy_process_group() and "
    "init_process_group() on every rank"
)


class MeetingError(RuntimeError):
    """A rank was missing when connections were to be made."""


class Board:
    """Keys of one group in the store.

    Args:
        store: of torch.distributed, with a prefix that belongs to this group.
        members: global ranks.
        rank: of this process.
        timeout: seconds to wait for others.
    """

    def __init__(self, store: Any, members: tuple[int, ...], rank: int, timeout: float) -> None:
        self.store, self._members, self._rank = store, members, rank
        self._timeout = timeout

    def meet(self) -> None:
        """Return when every member has come here.

        Raises:
            MeetingError: one has not within the timeout, or another gave up.
        """
        # A store can outlive a process group, as torchrun's does: a rank's n-th meeting is the others' n-th.
        number = self.store.add(f"meetings/{self._rank}", 1)
        self.store = distributed.PrefixStore(f"{number}", self.store)
        self.store.set(f"here/{self._rank}", "")
        deadline = time.monotonic() + self._timeout
        pause = 1e-3
        while not self.is_alarmed():
            now = time.monotonic()  # before the look: who came in time is never called absent
            absent = self._absent("here", self._members)
            if not absent:
                return
            if now > deadline:
                raise MeetingError(f"{_named(absent)} did not come within {self._timeout:g} s to connect")
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        absent = self._absent("here", self._members)
        late = _named(absent) if absent else "this one"
        raise MeetingError(f"another rank gave up before {late} came to connect")

    def is_alarmed(self) -> bool:
        """Whether an exchange of a member failed."""
        return bool(self.store.check(["alarm"]))

    def post(self, sent: str) -> None:
        """Tell the others what this rank sent in the exchange that failed, if the store answers."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"sent/{self._rank}", sent)
            self.store.set("alarm", "")

    def error(self, label: str, mark: Mark, cause: Exception) -> RankError:
        """Return why an exchange failed, after a short while in which others tell what they sent."""
        reason = _brief(cause)
        try:
            absent = self._silent()
            found = [*_missing(absent, self._timeout), *self._unlike(mark.sent, absent)]
        except RuntimeError as error:
            answer = str(error).partition("\n")[0]
            found = [
                f"who is missing is unknown: the store of torch.distributed does not answer ({answer}), so "
                "the process that holds it, most often rank 0, was killed"
            ]
        if isinstance(cause, MeetingError):
            found = found or [reason]
        found = found or ["the others gave up too: this rank came too late, or a connection broke"]
        return RankError(
            f"rank {self._rank} could not share statistics ({mark.act}): {'; '.join(found)}. {_REMEDY}. "
            f"Cause: {reason}",
            layer=label,
        )

    def _silent(self) -> list[int]:
        """Return the ranks that do not tell what they sent."""
        pause = 5e-3
        absent = self._absent("sent", [rank for rank in self._members if rank != self._rank])
        deadline = time.monotonic() + _SOON
        while absent and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            before, absent = absent, self._absent("sent", absent)
            if len(absent) < len(before):  # of many on a slow machine, more may be about to answer
                deadline = time.monotonic() + _SOON
        return absent

    def _unlike(self, sent: str, absent: Sequence[int]) -> list[str]:
        """Return what other ranks sent that is not what this one did."""
        ranks_by_sent: dict[str, list[int]] = {}
        for rank in self._members:
            if rank not in absent and rank != self._rank:
                theirs = self.store.get(f"sent/{rank}").decode(errors="replace")
                if theirs != sent:
                    ranks_by_sent.setdefault(theirs, []).append(rank)
        return [
            f"{_named(ranks)} sent something else, {theirs}"
            for theirs, ranks in list(ranks_by_sent.items())[:_NAMED]
        ]

    def _absent(self, key: str, ranks: Sequence[int]) -> list[int]:
        """Return the ranks whose key is not there: one question if all are, and few if few are not."""
        if self.store.check([f"{key}/{rank}" for rank in ranks]):
            return []
        if len(ranks) == 1:
            return list(ranks)
        half = len(ranks) // 2
        return self._absent(key, ranks[:half]) + self._absent(key, ranks[half:])


def _brief(error: Exception) -> str:
    """Return what an error says, less the line of Gloo's source and Gloo's guess at a reason."""
    return re.sub(r"^\[\S+:\d+\] |\. This is typically caused by .*", "", str(error).strip(), flags=re.DOTALL)


def _missing(absent: Sequence[int], timeout: float) -> list[str]:
    if not absent:
        return []
    were = "was killed, or is" if len(absent) == 1 else "were killed, or are"
    return [f"no sign of {_named(absent)}, which {were} elsewhere and did not come within {timeout:g} s"]


def _named(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:_NAMED]))
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {named}{more}"
