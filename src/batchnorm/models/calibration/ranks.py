"""Lets the processes of torch.distributed pool moments together, each those of its own part of the data."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, distributed

from batchnorm.errors import OptionError, RankError
from batchnorm.statistics.calibration import Accumulator
from batchnorm.torch.collectives import operations as collectives

from .packing import Layout

_TEXT = 240  # bytes of an error's text that the other ranks receive


class Ranks:
    """One process, or all processes of a group: they finish each step together, or all of them raise.

    Args:
        group: a group of torch.distributed; None = all processes where it is initialized; False = this
            process alone.

    Attributes:
        rank: of this process in the group.
        size: number of processes.

    Raises:
        OptionError: a group without torch.distributed, or without this process.
    """

    def __init__(
        self, group: distributed.ProcessGroup | Literal[False] | None, verb: str = "calibrate"
    ) -> None:
        self._verb = verb
        is_initialized = distributed.is_available() and distributed.is_initialized()
        if group not in (None, False) and not is_initialized:
            raise OptionError(
                "group= needs torch.distributed, which is not initialized: init_process_group()"
            )
        self.rank, self.size = 0, 1
        if group is False or not is_initialized:
            return
        process_group = distributed.group.WORLD if group is None else group
        self.rank = distributed.get_rank(process_group)
        if self.rank < 0:
            raise OptionError(f"this process is not of the group: call {verb} on the ranks of the group")
        self.size = distributed.get_world_size(process_group)
        members = distributed.get_process_group_ranks(process_group)
        self._members = collectives.Ranks(tuple(members), collectives.timeout_of(process_group))

    def own(self, path: Path) -> Path:
        """Return the path of this rank's own file."""
        return path if self.size == 1 else path.with_name(f"{path.name}.{self.rank}")

    def together(self, work: Callable[[], None]) -> None:
        """Do the work of this rank, and wait until every rank has done its own.

        Raises:
            RankError: the work of another rank raised, or another rank is missing.
            BaseException: what the work of this rank raised.
        """

        def done() -> Tensor:
            work()
            return torch.zeros(1, dtype=torch.float64)

        self.gather(done, 1)

    def accumulated(self, work: Callable[[], Accumulator], layout: Layout) -> Accumulator:
        """Return what the work of all ranks accumulates, bit for bit the same on each of them.

        Raises:
            RankError, BaseException: as of `together`.
        """
        if self.size == 1:
            return work()
        rows = self.gather(lambda: layout.packed(work()), layout.length)
        return reduce(Accumulator.merged, map(layout.unpacked, rows))

    def gather(self, work: Callable[[], Tensor], length: int) -> list[Tensor]:
        """Do the work of this rank and return what every rank found, in the order of ranks.

        This is one collective. A rank whose work raised takes part in it too, and sends the error's text.

        Args:
            work: returns a row of float64.
            length: of the row, the same on every rank.

        Raises:
            RankError, BaseException: as of `together`.
        """
        if self.size == 1:
            return [work()]
        error: BaseException | None = None
        try:
            row = work()
        except BaseException as caught:
            error, row = caught, torch.zeros(length, dtype=torch.float64)
        rows = collectives.gather(torch.cat((_as_numbers(error), row)), self._members, self._verb)
        if error is not None:
            raise error
        for rank, other in enumerate(rows):
            if other[0]:
                text = bytes(map(int, other[1 : 1 + _TEXT].tolist())).rstrip(b"\0").decode(errors="ignore")
                raise RankError(
                    f"{self._verb} changed nothing on any rank, because rank {rank} raised {text}"
                )
        return [other[1 + _TEXT :] for other in rows]


def _as_numbers(error: BaseException | None) -> Tensor:
    """Return an error as numbers: whether there is one, and the bytes of its text."""
    numbers = torch.zeros(1 + _TEXT, dtype=torch.float64)
    if error is not None:
        text = f"{type(error).__name__}: {error}".encode()[:_TEXT]
        numbers[0] = 1.0
        numbers[1 : 1 + len(text)] = torch.tensor(list(text), dtype=torch.float64)
    return numbers
