"""Numbers between the processes of a group, by the collectives of its backend: NCCL on GPUs, all but Gloo.

On a GPU the host never waits. A rank that sent another layer's message ends the job by an assertion on the
device, and one that does not come ends it by NCCL's watchdog. Neither can name a layer. So when the latest
collective has taken most of the timeout, our log lists the last ones, by their numbers in the group; the
watchdog's message has the number of the one that hangs ("SeqNum").

No test runs this over NCCL; they run it over another backend.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from .messages import Mark, UnlikeError

_KEPT = 256  # messages: of two steps of ResNet-50, which the host may be ahead of the device


class BackendWire:
    """A process group of torch.distributed.

    Args:
        members: global ranks.
        timeout: seconds.
    """

    is_on_cpu = False

    def __init__(self, members: tuple[int, ...], timeout: float) -> None:
        # Made by the members only. Its name counts the groups that a process has (torch 2.13): all members
        # must have made equally many before.
        self._group = distributed.new_group(
            list(members), timeout=timedelta(seconds=timeout), use_local_synchronization=True
        )
        self._size = len(members)
        self._number = 0
        self._sent: deque[str] = deque(maxlen=_KEPT)
        self._latest: Any = None

    def gather(self, packet: Tensor, mark: Mark) -> Tensor:
        """Return every member's packet, `[size, *packet.shape]`, in order."""
        number, sent = self._marked(packet, mark)
        rows = sent.new_empty((self._size, sent.numel()))
        self._finish(distributed.all_gather(list(rows), sent, group=self._group, async_op=True))
        self._check((rows[:, 0] == number).all(), mark)
        return rows[:, 1:].reshape(self._size, *packet.shape).contiguous()

    def add(self, packet: Tensor, mark: Mark) -> Tensor:
        """Return the sum of all packets.

        Marks are added too. If all are alike, their sum is `size` times one's own; if not, it is that
        only for a rank whose mark happens to be the mean of all.
        """
        number, total = self._marked(packet, mark)
        self._finish(distributed.all_reduce(total, group=self._group, async_op=True))
        self._check(total[0] == self._size * number, mark)
        return total[1:].reshape(packet.shape).clone()

    def hang_up(self) -> None:
        """Nothing: the others' collectives end by their timeout."""

    def overdue(self) -> str:
        """Return what was sent last, unless all of it was received."""
        # This asks the device, which would spoil a graph that another thread is just capturing: so it does
        # only when nothing was sent for long.
        is_done = self._latest is None or self._latest.is_completed()
        return "" if is_done else "\n".join(self._sent)

    def _finish(self, work: Any) -> None:
        """Let what follows wait for a collective: on a GPU the stream, not the host."""
        self._latest = work
        work.wait()

    def _marked(self, packet: Tensor, mark: Mark) -> tuple[int, Tensor]:
        """Return the mark, small enough that sums over ranks are exact, and the packet with it in front."""
        number = mark.number % (1 << (40 if packet.dtype == torch.float64 else 12))
        sent = packet.new_empty(1 + packet.numel())
        sent[0] = number
        sent[1:] = packet.flatten()
        self._number += 1
        self._sent.append(f"{self._number}: {mark.sent}")
        return number, sent

    @staticmethod
    def _check(is_alike: Tensor, mark: Mark) -> None:
        if is_alike.device.type == "cpu":
            if not is_alike:
                raise UnlikeError
        else:
            torch._assert_async(is_alike, f"batchnorm: a rank sent another message than {mark.sent}")
