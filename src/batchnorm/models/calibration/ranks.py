"""The processes of torch.distributed that calibrate together, each on its own part of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from batchnorm.errors import OptionError, RankError

_TOLD = 240  # bytes of an error's text that the other ranks are told


class Ranks:
    """One process, or all of a group: they do each step together, or all of them raise.

    Args:
        group: a group of torch.distributed; None = all processes where it is initialized; False = this
            process alone.

    Attributes:
        rank: of this process in the group.
        size: number of processes.
    """

    def __init__(self, group: Any) -> None:
        is_initialized = distributed.is_available() and distributed.is_initialized()
        if group not in (None, False) and not is_initialized:
            raise OptionError(
                "group= needs torch.distributed, which is not initialized: init_process_group()"
            )
        self.is_alone = group is False or not is_initialized
        self.group = None if self.is_alone else group
        self.rank = 0 if self.is_alone else distributed.get_rank(self.group)
        self.size = 1 if self.is_alone else distributed.get_world_size(self.group)
        if self.rank < 0:
            raise OptionError("this process is not of the group that calibrates: call calibrate on its ranks")

    def gather(self, work: Callable[[], Tensor], length: int) -> list[Tensor]:
        """Do the work of this rank and return what every rank found, in the order of ranks.

        One collective, in which a rank whose work raised takes part too, and tells the others.

        Args:
            work: returns a row of float64.
            length: of the row, the same on every rank.

        Raises:
            RankError: the work of another rank raised.
            BaseException: what the work of this one raised.
        """
        if self.is_alone:
            return [work()]
        error: BaseException | None = None
        try:
            row = work()
        except BaseException as caught:
            error, row = caught, torch.zeros(length, dtype=torch.float64)
        rows = self._all_gather(torch.cat((_told(error), row)))
        if error is not None:
            raise error
        for rank, other in enumerate(rows):
            if other[0]:
                raise RankError(
                    f"calibrate changed nothing on any rank, because rank {rank} raised {_heard(other)}"
                )
        return [other[1 + _TOLD :] for other in rows]

    def _all_gather(self, row: Tensor) -> list[Tensor]:
        backend = distributed.get_backend(self.group)
        device = torch.device("cuda" if "nccl" in backend else "cpu")
        row = row.to(device)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        distributed.all_gather(rows, row, group=self.group)
        return [other.cpu() for other in rows]


def _told(error: BaseException | None) -> Tensor:
    """Return an error as numbers: whether there is one, and the bytes of its text."""
    told = torch.zeros(1 + _TOLD, dtype=torch.float64)
    if error is not None:
        text = f"{type(error).__name__}: {error}".encode()[:_TOLD]
        told[0] = 1.0
        told[1 : 1 + len(text)] = torch.tensor(list(text), dtype=torch.float64)
    return told


def _heard(row: Tensor) -> str:
    told = bytes(int(number) for number in row[1 : 1 + _TOLD].tolist())
    return told.rstrip(b"\0").decode(errors="ignore")
