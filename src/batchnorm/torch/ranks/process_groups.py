"""The processes that share statistics, and the connections between them, which are nobody else's.

Connections are found at run time by what is asked for and by torch's default process group. They are made at
first use, by the members only; no layer stores them, and they go when the default process group does.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed

from batchnorm.errors import OptionError, RankError

from .backend_wire import BackendWire
from .gloo_wire import GlooWire
from .lost_ranks import Board
from .sharing import Sharing, Wire


@dataclass(frozen=True)
class Ranks:
    """Who shares statistics.

    Args:
        group: global ranks; None = all.
        timeout: seconds to wait for others before an error names those that are missing.
        size: how many they were in the forward, which its backward must find again; None = any number.
        call: of those who share, the number of the forward: its backward has it too.
    """

    group: tuple[int, ...] | None
    timeout: float
    size: int | None = None
    call: int = 0


# By default process group: by what was asked for, and by what that comes to.
_made: weakref.WeakKeyDictionary[Any, dict[Any, Sharing]] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def members(ranks: Ranks) -> int:
    """Return the number of processes that take part: 1 where torch.distributed is not initialized.

    Raises:
        OptionError: this process is none of the group's, or the group has ranks that do not exist.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    size = distributed.get_world_size()
    if ranks.group is None:
        return size
    rank = distributed.get_rank()
    if rank not in ranks.group or max(ranks.group) >= size or min(ranks.group) < 0:
        raise OptionError(
            f"Synced: group={ranks.group} must be ranks of torch.distributed, 0 to {size - 1}, and this one, "
            f"{rank}, must be among them"
        )
    return len(ranks.group)


def sharing_ranks(group: tuple[int, ...] | None, timeout: float) -> Ranks | None:
    """Return who shares statistics in a forward that begins now; None = this process shares with no other.

    Args, Raises: as `Ranks`, as `members`.
    """
    size = members(Ranks(group, timeout))
    return Ranks(group, timeout, size) if size > 1 else None


def members_as_before(ranks: Ranks, label: str) -> int:
    """Return the number of processes that take part in what `label` shares.

    Raises:
        RankError: they are not as many as they were in the forward.
        OptionError: as `members`.
    """
    size = members(ranks)
    if ranks.size not in (None, size):
        raise RankError(
            f"the forward shared statistics with {ranks.size} ranks, and its backward finds {size}: "
            "call backward() before destroy_process_group(), and with the group of the forward",
            layer=label,
        )
    return size


def index_of(ranks: Ranks) -> int:
    """Return the place of this process among those that take part."""
    if members(ranks) == 1:
        return 0
    rank = distributed.get_rank()
    return rank if ranks.group is None else sorted(ranks.group).index(rank)


def numbered(ranks: Ranks, device: torch.device) -> Ranks:
    """Return who shares statistics of a forward on a device, with the number of its call.

    While a program is traced there is none: its operators ask for one whenever they run.
    """
    if torch.compiler.is_compiling():
        return ranks
    return replace(ranks, call=sharing(ranks, device).next_call())


def sharing(ranks: Ranks, device: torch.device) -> Sharing:
    """Return the connections of those who share tensors on a device; nobody has to be there yet."""
    default = distributed.group.WORLD
    table = _made.get(default)
    found = None if table is None else table.get((ranks.group, ranks.timeout, device.type))
    return _make(default, ranks, device) if found is None else found


def _make(default: Any, ranks: Ranks, device: torch.device) -> Sharing:
    everyone = tuple(range(distributed.get_world_size()) if ranks.group is None else sorted(ranks.group))
    backend = _backend(device)
    key = (everyone, ranks.timeout, backend)
    with _making:
        for other in [other for other in _made if other is not default]:
            del _made[other]  # destroyed, though somebody may still hold it
        table = _made.setdefault(default, {})
        if key not in table:
            table[key] = _sharing(everyone, ranks.timeout, backend)
        table[ranks.group, ranks.timeout, device.type] = table[key]
        return table[key]


def _sharing(everyone: tuple[int, ...], timeout: float, backend: str) -> Sharing:
    name = hashlib.blake2b(repr((everyone, timeout, backend)).encode(), digest_size=16).hexdigest()
    store = distributed.PrefixStore(f"batchnorm/{name}", distributed.distributed_c10d._get_default_store())
    board = Board(store, everyone, distributed.get_rank(), timeout)
    index = everyone.index(distributed.get_rank())

    def connect() -> Wire:
        if backend == "gloo":
            return GlooWire(board.store, index, len(everyone), timeout)
        return BackendWire(everyone, timeout)

    return Sharing(board, connect, timeout)


def _backend(device: torch.device) -> str:
    """Return what carries tensors of a device: its backend in the default process group, else Gloo."""
    config: str = distributed.get_backend_config()
    backends = dict(pair.split(":", 1) for pair in config.split(",") if ":" in pair)
    has_gloo = distributed.is_gloo_available()
    return backends.get(device.type, "gloo" if has_gloo else distributed.get_backend())
