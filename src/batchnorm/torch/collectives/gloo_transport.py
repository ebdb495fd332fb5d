"""Carries packets between processes on CPUs, by point-to-point messages of Gloo.

Gloo's own collectives do not serve here. When a rank skipped a layer, ranks disagree about a length. A
message that is too long then ends the process that receives it (`std::terminate`, "Received data size doesn't
match expected size"), and one that is too short is accepted (torch 2.13). Point-to-point messages carry a
tag, and pair with equal tags only; the tag is the length, so messages of different lengths never pair. A
fingerprint travels beside each message, and a rank that receives another fingerprint than its own raises.

A gather takes ⌈log2 R⌉ rounds (Bruck et al. 1997), where Gloo's takes R - 1.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from .exchange import Fingerprint, FingerprintMismatchError

_FINGERPRINT_TAG = 0  # that of other messages is the number of their bytes
_LAST_TAG = 2**31 - 1  # no message has it


class GlooTransport:
    """Connections between all members of a group.

    Args:
        store: a store of torch.distributed, with a prefix for this group alone.
        index: index of this process among the members.
        size: number of members.
        timeout: seconds after which a collective raises RuntimeError, if a member does not take part.
    """

    is_on_cpu = True

    def __init__(self, store: Any, index: int, size: int, timeout: float) -> None:
        self._backend: Any = distributed.distributed_c10d.ProcessGroupGloo(
            store, index, size, timedelta(seconds=timeout)
        )
        self.index, self.size, self.timeout = index, size, timeout

    def gather(self, packet: Tensor, fingerprint: Fingerprint) -> Tensor:
        """Return every member's packet, `[size, *packet.shape]`, in the order of the members.

        After round k a rank has the packets of its 2ᵏ⁺¹ successors, itself included.
        """
        send = _Collective(self._backend, fingerprint.number, self.timeout)
        rows = packet.new_empty((self.size, packet.numel()))
        rows[0] = packet.flatten()
        have = 1
        while have < self.size:
            more = min(have, self.size - have)
            to, source = (self.index - have) % self.size, (self.index + have) % self.size
            send(to=to, sent=rows[:more], source=source, received=rows[have : have + more])
            have += more
        return rows.roll(self.index, 0).reshape(self.size, *packet.shape)

    def add(self, packet: Tensor, fingerprint: Fingerprint) -> Tensor:
        """Return the sum of all packets, the same bits on every rank.

        In round k two ranks 2ᵏ apart swap their sums and add them: a + b equals b + a, bit for bit. Ranks
        beyond the largest power of two send their packet to a rank below it first, and receive the sum last.
        """
        send = _Collective(self._backend, fingerprint.number, self.timeout)
        total = packet.flatten().clone()
        other = torch.empty_like(total)
        power = 1 << (self.size.bit_length() - 1)
        if self.index >= power:
            send(to=self.index - power, sent=total)
            send(source=self.index - power, received=total)
            return total.reshape(packet.shape)
        has_guest = self.index + power < self.size
        if has_guest:
            send(source=self.index + power, received=other)
            total += other
        distance = 1
        while distance < power:
            partner = self.index ^ distance
            send(to=partner, sent=total, source=partner, received=other)
            total += other
            distance *= 2
        if has_guest:
            send(to=self.index + power, sent=total)
        return total.reshape(packet.shape)

    def close(self) -> None:
        """Close all connections, so that a thread that waits at either end raises.

        `abort` and `shutdown` do not interrupt a waiting `recv` (torch 2.13), but a wait that times out
        closes the connection. So this waits, with a short timeout, for a message that no member sends.
        """
        # Gloo has one context for each network interface, and picks one by the tag.
        contexts = len(os.environ.get("GLOO_SOCKET_IFNAME", "").split(","))
        for tag in range(_LAST_TAG - contexts + 1, _LAST_TAG + 1):
            for index in range(self.size):
                if index != self.index:
                    try:
                        self._backend.recv([torch.empty(1)], index, tag).wait(timedelta(milliseconds=1))
                    except RuntimeError:
                        continue  # the first timeout on an open connection closes all of them

    def pending(self) -> str:
        """Return an empty string: the host waits for each collective, so every message has arrived."""
        return ""


class _Collective:
    """The messages of one collective.

    Args:
        backend: the process group of Gloo.
        fingerprint: number of the fingerprint.
        timeout: seconds for all messages together.
    """

    def __init__(self, backend: Any, fingerprint: int, timeout: float) -> None:
        self.backend, self.fingerprint = backend, torch.tensor([fingerprint])
        self.deadline = time.monotonic() + timeout

    def __call__(
        self,
        *,
        to: int | None = None,
        sent: Tensor | None = None,
        source: int | None = None,
        received: Tensor | None = None,
    ) -> None:
        """Send to one member, receive from one (another, or the same), or both; return when both are done."""
        found = torch.zeros_like(self.fingerprint)
        fingerprints, works = [], []
        if received is not None:
            fingerprints.append(self.backend.recv([found], source, _FINGERPRINT_TAG))
            works += self._message(self.backend.recv, received, source)
        if sent is not None:
            works.append(self.backend.send([self.fingerprint], to, _FINGERPRINT_TAG))
            works += self._message(self.backend.send, sent, to)
        for work in fingerprints:
            self._wait(work)
            if not torch.equal(found, self.fingerprint):
                raise FingerprintMismatchError
        for work in works:
            self._wait(work)

    @staticmethod
    def _message(act: Any, values: Tensor, index: int | None) -> list[Any]:
        """Begin to send or receive values, tagged by their length; an empty message needs none."""
        tag = values.numel() * values.element_size()
        assert tag < _LAST_TAG - 64, "a packet of 2 GB"
        return [act([values], index, tag)] if tag else []

    def _wait(self, work: Any) -> None:
        """Wait for one message, at most until the deadline of all."""
        left = max(self.deadline - time.monotonic(), 1e-3)
        work.wait(timedelta(seconds=left))
