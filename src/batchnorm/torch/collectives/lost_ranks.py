"""Finds out, after a failure, which ranks are missing: ranks report through the store of torch.distributed.

A rank whose collective failed writes what it sent. The ranks that wait in the same collective see that, stop
waiting, and write what they sent; a rank that writes nothing within a short while is missing. Without a
failure nothing is written or read after the meeting at which a group is made.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from typing import Any

from torch import distributed

from batchnorm.errors import RankError

_SOON = 0.8  # seconds after the latest answer, after which a silent rank is missing: ranks poll more often
_NAMED = 16  # the number of ranks that an error message names
_REMEDY = (
    "These ranks share nothing from here on: restart the job, or call destroy_process_group() and "
    "init_process_group() on every rank"
)


class MeetingError(RuntimeError):
    """A rank was missing when connections were to be made."""


class Board:
    """The keys of one group in the store, by which its ranks meet and report failures.

    Args:
        store: a store of torch.distributed, with a prefix for this group alone.
        members: global ranks.
        rank: global rank of this process.
        timeout: seconds to wait for the other members.
    """

    def __init__(self, store: Any, members: tuple[int, ...], rank: int, timeout: float) -> None:
        self.store, self._members, self._rank = store, members, rank
        self._timeout = timeout

    def meet(self) -> None:
        """Wait until every member has come to its meeting.

        Raises:
            MeetingError: a member has not come within the timeout, or another member gave up.
        """
        # A store can outlive a process group, as torchrun's does, so meetings are numbered: the n-th of each
        # rank is the same one.
        number = self.store.add(f"meetings/{self._rank}", 1)
        self.store = distributed.PrefixStore(f"{number}", self.store)
        self.store.set(f"here/{self._rank}", "")
        deadline = time.monotonic() + self._timeout
        pause = 1e-3
        while not self.is_alarmed():
            now = time.monotonic()  # before the check, so that no rank that came in time is called absent
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
        """Whether a collective of a member failed."""
        return bool(self.store.check(["alarm"]))

    def post(self, sent: str) -> None:
        """Report to the other ranks what this rank sent in the failed collective, if the store answers."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"sent/{self._rank}", sent)
            self.store.set("alarm", "")

    def error(self, label: str, operation: str, sent: str, cause: Exception) -> RankError:
        """Return an error that names the missing ranks, after waiting for the reports of the others.

        Args:
            label: identifies the layer.
            operation: the operation and what its packet looks like.
            sent: what this rank reported with `post`.
            cause: the error of the collective.
        """
        reason = _brief(cause)
        try:
            absent = self._silent()
            found = [*_missing(absent, self._timeout), *self._unlike(sent, absent)]
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
            f"rank {self._rank} could not share statistics ({operation}): {'; '.join(found)}. {_REMEDY}. "
            f"Cause: {reason}",
            layer=label,
        )

    def _silent(self) -> list[int]:
        """Return the ranks that do not report what they sent."""
        pause = 5e-3
        absent = self._absent("sent", [rank for rank in self._members if rank != self._rank])
        deadline = time.monotonic() + _SOON
        while absent and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            before, absent = absent, self._absent("sent", absent)
            if len(absent) < len(before):  # on a slow machine, more ranks may be about to report
                deadline = time.monotonic() + _SOON
        return absent

    def _unlike(self, sent: str, absent: Sequence[int]) -> list[str]:
        """Return the different messages of other ranks, each with those ranks."""
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
        """Return the ranks whose key is missing, by bisection: one query if none is, and few if few are."""
        if self.store.check([f"{key}/{rank}" for rank in ranks]):
            return []
        if len(ranks) == 1:
            return list(ranks)
        half = len(ranks) // 2
        return self._absent(key, ranks[:half]) + self._absent(key, ranks[half:])


def _brief(error: Exception) -> str:
    """Return the text of an error without the line of Gloo's source and Gloo's guess at a reason."""
    return re.sub(r"^\[\S+:\d+\] |\. This is typically caused by .*", "", str(error).strip(), flags=re.DOTALL)


def _missing(absent: Sequence[int], timeout: float) -> list[str]:
    """Return what an error message says of missing ranks."""
    if not absent:
        return []
    were = "was killed, or is" if len(absent) == 1 else "were killed, or are"
    return [f"no sign of {_named(absent)}, which {were} elsewhere and did not come within {timeout:g} s"]


def _named(ranks: Sequence[int]) -> str:
    """Return the ranks as words: "ranks 0, 1 and 7 more" where there are many."""
    named = ", ".join(map(str, ranks[:_NAMED]))
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {named}{more}"
