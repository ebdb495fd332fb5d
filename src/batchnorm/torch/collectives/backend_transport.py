"""Carries packets by the collectives of a process group's backend: NCCL on GPUs, and every other but Gloo.

On a GPU the host never waits. If a rank sends another layer's message, an assertion on the device ends the
job; if a rank does not come, NCCL's watchdog does. Neither can name a layer. So when the latest collective
has taken most of the timeout, our log lists the last ones, by their numbers in the group; the watchdog's
message has the number of the one that hangs ("SeqNum").

No test runs this over NCCL; tests run it over another backend.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from .exchange import Fingerprint, FingerprintMismatchError

_KEPT = 256  # messages, as many as two steps of ResNet-50 send: the host may be that far ahead of the device


class BackendTransport:
    """Collectives of a process group of torch.distributed.

    Args:
        members: global ranks.
        timeout: seconds.
    """

    is_on_cpu = False

    def __init__(self, members: tuple[int, ...], timeout: float) -> None:
        # Only the members make the group. Torch names it by the number of groups that a process has made
        # (torch 2.13), so all members must have made equally many before.
        self._group = distributed.new_group(
            list(members), timeout=timedelta(seconds=timeout), use_local_synchronization=True
        )
        self._size = len(members)
        self._number = 0
        self._messages: deque[str] = deque(maxlen=_KEPT)
        self._latest: Any = None

    def gather(self, packet: Tensor, fingerprint: Fingerprint) -> Tensor:
        """Return every member's packet, `[size, *packet.shape]`, in the order of the members."""
        number, sent = self._with_fingerprint(packet, fingerprint)
        rows = sent.new_empty((self._size, sent.numel()))
        self._finish(distributed.all_gather(list(rows), sent, group=self._group, async_op=True))
        self._check((rows[:, 0] == number).all(), fingerprint)
        return rows[:, 1:].reshape(self._size, *packet.shape).contiguous()

    def add(self, packet: Tensor, fingerprint: Fingerprint) -> Tensor:
        """Return the sum of all packets.

        Fingerprints are added too. If all are equal, their sum is `size` times one of them; if not, that
        holds only on a rank whose fingerprint happens to be the mean of all.
        """
        number, total = self._with_fingerprint(packet, fingerprint)
        self._finish(distributed.all_reduce(total, group=self._group, async_op=True))
        self._check(total[0] == self._size * number, fingerprint)
        return total[1:].reshape(packet.shape).clone()

    def close(self) -> None:
        """Do nothing: the collectives of the other members end by their timeout."""

    def pending(self) -> str:
        """Return the latest messages, unless all of them have arrived."""
        # This queries the device, which would break a graph that another thread is capturing. So the caller
        # asks only when nothing was sent for long.
        is_done = self._latest is None or self._latest.is_completed()
        return "" if is_done else "\n".join(self._messages)

    def _finish(self, work: Any) -> None:
        """Make later work wait for a collective: on a GPU the stream waits, not the host."""
        self._latest = work
        work.wait()

    def _with_fingerprint(self, packet: Tensor, fingerprint: Fingerprint) -> tuple[int, Tensor]:
        """Return the fingerprint's number and the packet with it in front.

        The number is reduced so far that sums over ranks are exact.
        """
        number = fingerprint.number % (1 << (40 if packet.dtype == torch.float64 else 12))
        sent = packet.new_empty(1 + packet.numel())
        sent[0] = number
        sent[1:] = packet.flatten()
        self._number += 1
        self._messages.append(f"{self._number}: {fingerprint.message}")
        return number, sent

    @staticmethod
    def _check(is_alike: Tensor, fingerprint: Fingerprint) -> None:
        """Raise on the host, or assert on the device, if a rank sent another fingerprint."""
        if is_alike.device.type == "cpu":
            if not is_alike:
                raise FingerprintMismatchError
        else:
            message = f"batchnorm: a rank sent another message than {fingerprint.message}"
            torch._assert_async(is_alike, message)
