"""Numbers of all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ranks:
    group: tuple[int, ...] | None
    timeout: float


def members(ranks: Ranks) -> int:
    return 1


def gather(packet: Any, ranks: Ranks, label: str) -> Any:
    raise NotImplementedError


add = differentiable_gather = differentiable_add = gather
