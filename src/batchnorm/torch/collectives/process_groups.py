"""Finds the processes that share statistics, and the connections between them.

Connections are looked up at run time by the group that is asked for and by torch's default process group. The
members alone make them, at first use. No layer stores them, and they are dropped with the default process
group.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed

from batchnorm.errors import OptionError, RankError

from .backend_transport import BackendTransport
from .exchange import Exchange, Transport
from .gloo_transport import GlooTransport
from .lost_ranks import Board


@dataclass(frozen=True)
class Ranks:
    """The ranks that share statistics.

    Args:
        group: global ranks; None = all.
        timeout: seconds to wait for the others before an error names the missing ones.
        size: number of ranks in the forward, which the backward must find again; None = any number.
        call: number of the forward among the calls of this group; the backward has the same.
    """

    group: tuple[int, ...] | None
    timeout: float
    size: int | None = None
    call: int = 0


# By default process group, then by (group, timeout, device type) and by (members, timeout, backend).
_made: weakref.WeakKeyDictionary[Any, dict[Any, Exchange]] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def members(ranks: Ranks) -> int:
    """Return the number of processes that take part: 1 where torch.distributed is not initialized.

    Raises:
        OptionError: this process is not in the group, or the group has ranks that do not exist.
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
    """Return the ranks that share statistics in a forward that begins now; None = this process is alone.

    Args, Raises: as `Ranks`, as `members`.
    """
    size = members(Ranks(group, timeout))
    return Ranks(group, timeout, size) if size > 1 else None


def timeout_of(group: Any) -> float:
    """Return the seconds that a process group of torch.distributed waits for its members."""
    for device in ("cpu", "cuda"):
        with contextlib.suppress(RuntimeError, AttributeError):  # another device or backend
            return float(group._get_backend(torch.device(device)).options._timeout.total_seconds())
    return float(distributed.distributed_c10d.default_pg_timeout.total_seconds())


def members_as_before(ranks: Ranks, label: str) -> int:
    """Return the number of processes that take part in a collective of `label`.

    Raises:
        RankError: the number differs from that of the forward.
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
    """Return the index of this process among those that take part."""
    if members(ranks) == 1:
        return 0
    rank = distributed.get_rank()
    return rank if ranks.group is None else sorted(ranks.group).index(rank)


def numbered(ranks: Ranks, device: torch.device) -> Ranks:
    """Return the ranks that share the statistics of a forward on a device, with the number of its call.

    A program that is being traced has no such number: its operators ask for one when they run.
    """
    if torch.compiler.is_compiling():
        return ranks
    return replace(ranks, call=exchange_of(ranks, device).next_call())


def exchange_of(ranks: Ranks, device: torch.device) -> Exchange:
    """Return the exchange of these ranks for tensors on a device; it connects them at its first use."""
    default = distributed.group.WORLD
    table = _made.get(default)
    found = None if table is None else table.get((ranks.group, ranks.timeout, device.type))
    return _make(default, ranks, device) if found is None else found


def _make(default: Any, ranks: Ranks, device: torch.device) -> Exchange:
    """Return the exchange of these ranks, made unless another group of the same members has made it."""
    everyone = tuple(range(distributed.get_world_size()) if ranks.group is None else sorted(ranks.group))
    backend = _backend(device)
    key = (everyone, ranks.timeout, backend)
    with _making:
        for other in [other for other in _made if other is not default]:
            del _made[other]  # destroyed, though a reference may keep it alive
        table = _made.setdefault(default, {})
        if key not in table:
            table[key] = _exchange(everyone, ranks.timeout, backend)
        table[ranks.group, ranks.timeout, device.type] = table[key]
        return table[key]


def _exchange(everyone: tuple[int, ...], timeout: float, backend: str) -> Exchange:
    """Return a new exchange between global ranks over a backend."""
    name = hashlib.blake2b(repr((everyone, timeout, backend)).encode(), digest_size=16).hexdigest()
    store = distributed.PrefixStore(f"batchnorm/{name}", distributed.distributed_c10d._get_default_store())
    board = Board(store, everyone, distributed.get_rank(), timeout)
    index = everyone.index(distributed.get_rank())

    def connect() -> Transport:
        if backend == "gloo":
            return GlooTransport(board.store, index, len(everyone), timeout)
        return BackendTransport(everyone, timeout)

    return Exchange(board, connect, timeout)


def _backend(device: torch.device) -> str:
    """Return the backend for tensors of a device: that of the default process group, else Gloo."""
    config: str = distributed.get_backend_config()
    backends = dict(pair.split(":", 1) for pair in config.split(",") if ":" in pair)
    has_gloo = distributed.is_gloo_available()
    return backends.get(device.type, "gloo" if has_gloo else distributed.get_backend())
