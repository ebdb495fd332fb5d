"""Numbers between the processes of a group on CPUs: messages from one to another, by Gloo.

Gloo's own collectives cannot serve. When a rank skipped a layer, ranks disagree about a length. The longer
message then ends the process that receives it (`std::terminate`, "Received data size doesn't match expected
size"), and the shorter one is taken for the longer (torch 2.13). Messages from one rank to another carry a
tag, and pair with equal tags only; ours is the length, so no two lengths ever meet. A mark travels beside
each message: whoever receives another mark than its own stops.

A gather takes ⌈log2 R⌉ rounds (Bruck et al. 1997), where Gloo's takes R - 1.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from .messages import Mark, UnlikeError

_MARK = 0  # the tag of marks; a message's is the number of its bytes
_LAST_TAG = 2**31 - 1  # of no message


class GlooWire:
    """Connections between all members of a group.

    Args:
        store: of torch.distributed, with a prefix that belongs to this group.
        index: of this process among the members.
        size: number of members.
        timeout: seconds until an exchange in which a member does not take part raises RuntimeError.
    """

    is_on_cpu = True

    def __init__(self, store: Any, index: int, size: int, timeout: float) -> None:
        self._backend: Any = distributed.distributed_c10d.ProcessGroupGloo(
            store, index, size, timedelta(seconds=timeout)
        )
        self.index, self.size, self.timeout = index, size, timeout

    def gather(self, packet: Tensor, mark: Mark) -> Tensor:
        """Return every member's packet, `[size, *packet.shape]`, in order.

        After round k a rank has the packets of its 2ᵏ⁺¹ successors, itself included.
        """
        exchange = _Exchange(self._backend, mark.number, self.timeout)
        rows = packet.new_empty((self.size, packet.numel()))
        rows[0] = packet.flatten()
        have = 1
        while have < self.size:
            more = min(have, self.size - have)
            to, source = (self.index - have) % self.size, (self.index + have) % self.size
            exchange(to=to, sent=rows[:more], source=source, received=rows[have : have + more])
            have += more
        return rows.roll(self.index, 0).reshape(self.size, *packet.shape)

    def add(self, packet: Tensor, mark: Mark) -> Tensor:
        """Return the sum of all packets, the same bits on every rank.

        In round k two ranks 2ᵏ apart swap their sums and add them: a + b is b + a, bit for bit. Ranks beyond
        the largest power of two hand their packet to one below before, and are handed the sum after.
        """
        exchange = _Exchange(self._backend, mark.number, self.timeout)
        total = packet.flatten().clone()
        other = torch.empty_like(total)
        power = 1 << (self.size.bit_length() - 1)
        if self.index >= power:
            exchange(to=self.index - power, sent=total)
            exchange(source=self.index - power, received=total)
            return total.reshape(packet.shape)
        has_guest = self.index + power < self.size
        if has_guest:
            exchange(source=self.index + power, received=other)
            total += other
        distance = 1
        while distance < power:
            partner = self.index ^ distance
            exchange(to=partner, sent=total, source=partner, received=other)
            total += other
            distance *= 2
        if has_guest:
            exchange(to=self.index + power, sent=total)
        return total.reshape(packet.shape)

    def hang_up(self) -> None:
        """Close all connections: whoever waits at their other end, or in another thread here, raises.

        Nothing does so by its name (`abort` and `shutdown` leave a waiting `recv` alone, torch 2.13), but a
        wait that times out does; so one is made to, for a message that nobody sends.
        """
        # One context for each network interface; the tag says which.
        contexts = len(os.environ.get("GLOO_SOCKET_IFNAME", "").split(","))
        for tag in range(_LAST_TAG - contexts + 1, _LAST_TAG + 1):
            for index in range(self.size):
                if index != self.index:
                    try:
                        self._backend.recv([torch.empty(1)], index, tag).wait(timedelta(milliseconds=1))
                    except RuntimeError:
                        continue  # at the first that is still connected all are closed

    def overdue(self) -> str:
        """Return nothing: an exchange has ended when its result is there."""
        return ""


class _Exchange:
    """One collective's messages.

    Args:
        backend: of Gloo.
        mark: what is sent, and by which layer, as a number.
        timeout: seconds for all messages together.
    """

    def __init__(self, backend: Any, mark: int, timeout: float) -> None:
        self.backend, self.mark = backend, torch.tensor([mark])
        self.deadline = time.monotonic() + timeout

    def __call__(
        self,
        *,
        to: int | None = None,
        sent: Tensor | None = None,
        source: int | None = None,
        received: Tensor | None = None,
    ) -> None:
        """Send to one member, receive from one (another, or the same), or both; return when all is done."""
        found = torch.zeros_like(self.mark)
        marks, works = [], []
        if received is not None:
            marks.append(self.backend.recv([found], source, _MARK))
            works += self._message(self.backend.recv, received, source)
        if sent is not None:
            works.append(self.backend.send([self.mark], to, _MARK))
            works += self._message(self.backend.send, sent, to)
        for mark in marks:
            self._wait(mark)
            if not torch.equal(found, self.mark):
                raise UnlikeError
        for work in works:
            self._wait(work)

    @staticmethod
    def _message(act: Any, values: Tensor, index: int | None) -> list[Any]:
        tag = values.numel() * values.element_size()
        assert tag < _LAST_TAG - 64, "a packet of 2 GB"
        return [act([values], index, tag)] if tag else []

    def _wait(self, work: Any) -> None:
        left = max(self.deadline - time.monotonic(), 1e-3)
        work.wait(timedelta(seconds=left))
