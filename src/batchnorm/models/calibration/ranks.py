"""The processes of torch.distributed that calibrate together, each on its own part of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from batchnorm.errors import OptionError, RankError
from batchnorm.torch.collectives import operations as collectives

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
        self.rank, self.size = 0, 1
        if group is False or not is_initialized:
            return
        self.rank = distributed.get_rank(group)
        if self.rank < 0:
            raise OptionError("this process is not of the group that calibrates: call calibrate on its ranks")
        self.size = distributed.get_world_size(group)
        process_group = distributed.group.WORLD if group is None else group
        members = distributed.get_process_group_ranks(process_group)
        self._everyone = collectives.Ranks(tuple(members), collectives.timeout_of(process_group))

    def gather(self, work: Callable[[], Tensor], length: int) -> list[Tensor]:
        """Do the work of this rank and return what every rank found, in the order of ranks.

        One collective, in which a rank whose work raised takes part too, and tells the others.

        Args:
            work: returns a row of float64.
            length: of the row, the same on every rank.

        Raises:
            RankError: the work of another rank raised, or another rank is missing.
            BaseException: what the work of this one raised.
        """
        if self.size == 1:
            return [work()]
        error: BaseException | None = None
        try:
            row = work()
        except BaseException as caught:
            error, row = caught, torch.zeros(length, dtype=torch.float64)
        rows = collectives.gather(torch.cat((_told(error), row)), self._everyone, "calibrate")
        if error is not None:
            raise error
        for rank, other in enumerate(rows):
            if other[0]:
                raise RankError(
                    f"calibrate changed nothing on any rank, because rank {rank} raised {_heard(other)}"
                )
        return [other[1 + _TOLD :] for other in rows]


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
