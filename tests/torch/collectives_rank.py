"""A rank that shares numbers with others.

WHAT is one of the functions at the end; what it finds is saved, and `test_collectives.py` judges it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from batchnorm.errors import OptionError, RankError
from batchnorm.torch.collectives import exchange, lost_ranks, process_groups
from batchnorm.torch.collectives.lost_ranks import Board
from batchnorm.torch.collectives.operations import (
    Ranks,
    add,
    differentiable_add,
    differentiable_gather,
    gather,
    members,
)
from batchnorm.torch.functional import gather_ranks

SHAPES = [(5,), (2, 3, 4), (), (0, 2), (1, 1000), (4097,)]
PATIENCE = 300.0  # seconds that no machine is so slow as to need
EVERYONE = Ranks(None, PATIENCE)
SHORT = 2.0  # seconds in which whoever waits for rank 1, which does not come, gives up
Found = dict[str, Any]


def packet_of(rank: int, shape: tuple[int, ...]) -> Tensor:
    """Return what a rank sends."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def table_of(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a packet, a cotangent of what all ranks gather, and one of the gradient."""
    generator = torch.Generator().manual_seed(100 + rank)
    shapes = (2, 3), (3, 2, 3), (2, 3)
    x, cotangent, second = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return x, cotangent, second


def loss_of(gathered: Tensor, total: Tensor, cotangent: Tensor) -> Tensor:
    """Return a loss with derivatives of any order, by what one rank gathered and added."""
    return (cotangent * gathered**3).sum() + (cotangent[0] * total**2 * gathered[1]).sum()


class Process:
    """One rank, and what it found."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        self.found: Found = {}
        self._meetings = 0

    @contextlib.contextmanager
    def together(self, backend: str = "gloo") -> Iterator[None]:
        """Initialize torch.distributed for a while."""
        self._meetings += 1
        where = f"file://{self.folder / f'meeting{self._meetings}'}"
        distributed.init_process_group(backend, init_method=where, rank=self.rank, world_size=self.size)
        yield
        distributed.destroy_process_group()

    def attempt(self, name: str, act: Callable[[], object]) -> None:
        """Do what must fail, and note how it did and after how many seconds."""
        began = time.monotonic()
        try:
            act()
        except (RuntimeError, OptionError) as error:
            layer = getattr(error, "layer", None)
            found = {"error": str(error), "kind": type(error).__name__, "layer": layer}
        else:
            found = {"error": "none"}
        self.found[name] = {**found, "seconds": time.monotonic() - began}

    def tell(self, word: str) -> None:
        """Tell the others something that this rank has come to."""
        distributed.distributed_c10d._get_default_store().set(f"{word}/{self.rank}", "")

    def hear(self, word: str, *ranks: int) -> None:
        """Wait until ranks have told this."""
        keys = [f"{word}/{rank}" for rank in ranks]
        distributed.distributed_c10d._get_default_store().wait(keys, timedelta(seconds=PATIENCE))

    def give_up(self, label: str) -> None:
        """Share something, in vain, and tell that this is over."""
        try:
            share(label)
        finally:
            self.tell("gave up")


def be_impatient() -> None:
    """Wait no longer than a short time for others from now on, where the group's timeout is long."""
    of_all = process_groups.exchange_of(EVERYONE, torch.device("cpu"))
    of_all._board._timeout = SHORT
    if of_all._transport is not None:
        of_all._transport.timeout = SHORT


def wait_for_answers(ranks: Sequence[int]) -> None:
    """Let whoever asks who is missing begin to count when these have answered, however slow they are."""
    silent = Board._silent

    def patient(board: Board) -> list[int]:
        board.store.wait([f"sent/{rank}" for rank in ranks], timedelta(seconds=PATIENCE))
        return silent(board)

    Board._silent = patient  # type: ignore[method-assign]
    lost_ranks._SOON = 1.0  # nobody answers any more


def _values(process: Process) -> None:
    """All shapes, in several states of autograd; one's own packet stays as it was."""
    for shape in SHAPES:
        packet = packet_of(process.rank, shape)
        name = str(shape)
        process.found[f"gather {name}"] = gather(packet, EVERYONE, name)
        process.found[f"add {name}"] = add(packet, EVERYONE, name)
        distributed.barrier()  # messages of others between ours
        assert torch.equal(packet, packet_of(process.rank, shape))
    strided = packet_of(process.rank, (4, 6)).t()[::2]
    process.found["strided"] = gather(strided, EVERYONE, "strided"), add(strided, EVERYONE, "strided")
    narrow = torch.full((3,), process.rank + 0.5)
    process.found["narrow"] = gather(narrow, EVERYONE, "narrow"), add(narrow, EVERYONE, "narrow")
    leaf = packet_of(process.rank, (5,)).requires_grad_()
    found = [f(leaf, EVERYONE, "leaf") for f in (gather, add)]
    assert not any(t.requires_grad for t in found)
    with torch.inference_mode():
        found = [f(packet_of(process.rank, (5,)), EVERYONE, "inference") for f in (gather, add)]
    process.found["inference"] = [t.clone() for t in found]


def _groups(process: Process) -> None:
    """Groups that overlap, of which not every rank makes equally many; then one of all."""
    process.found["members"] = members(EVERYONE), members(Ranks((process.rank,), 1.0))
    for group in ((0, 1), (1, 2), (2, 0), (0, 1, 2)):
        if process.rank in group:
            packet = packet_of(process.rank, (5,))
            process.found[f"group {sorted(group)}"] = gather(packet, Ranks(group, PATIENCE), "in a group")
    alone = packet_of(process.rank, (5,))
    only = Ranks((process.rank,), 1.0)
    gathered, total = gather(alone, only, "alone"), add(alone, only, "alone")
    assert torch.equal(gathered[0], alone)
    assert torch.equal(total, alone)
    assert total.data_ptr() != alone.data_ptr()
    process.attempt("no member", lambda: gather(alone, Ranks(((process.rank + 1) % 3,), 1.0), "x"))
    process.attempt("no rank", lambda: members(Ranks((0, 1, 2, 3), 1.0)))
    compiled = torch.compile(lambda x: x * members(EVERYONE), fullgraph=True, backend="eager")
    process.found["members compiled"] = compiled(torch.ones(1))


def _gradients(process: Process) -> None:
    """First and second order, and the transforms of torch.func."""
    x, cotangent, second = table_of(process.rank)
    x.requires_grad_()
    gathered = differentiable_gather(x, EVERYONE, "norm")
    total = differentiable_add(x.sin(), EVERYONE, "norm")
    loss = loss_of(gathered, total, cotangent)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (of_first,) = torch.autograd.grad((first * second).sum(), x)
    process.found["first"], process.found["second"] = first.detach(), of_first

    x = x.detach()

    def loss_by_x(x: Tensor) -> Tensor:
        gathered, total = differentiable_gather(x, EVERYONE, "f"), differentiable_add(x.sin(), EVERYONE, "f")
        return loss_of(gathered, total, cotangent)

    process.found["func first"] = torch.func.grad(loss_by_x)(x)
    process.found["tangents"] = [
        torch.func.jvp(lambda x, f=f: f(x, EVERYONE, "g"), (x,), (second,))[1]
        for f in (differentiable_gather, differentiable_add)
    ]
    process.found["batched"] = [
        torch.func.vmap(lambda x, f=f: f(x, EVERYONE, "h"), in_dims=1, out_dims=-1)(x)
        for f in (differentiable_gather, differentiable_add)
    ]


def _of_the_default_group(process: Process) -> None:
    """As layers of Keras gather: float32 in and out, by the label of the layer."""
    x, cotangent, _ = (t.float() for t in table_of(process.rank))
    x.requires_grad_()
    gathered = gather_ranks(x, "norm forward")
    (dx,) = torch.autograd.grad(gathered, x, cotangent)
    process.found["default group"] = gathered.detach(), dx


def _forked(process: Process) -> None:
    """In a child, connections are not to be touched: they are the parent's."""
    child = os.fork()
    if child == 0:
        try:
            gather(torch.zeros(5, dtype=torch.float64), EVERYONE, "forked")
        except RankError as error:
            os._exit(3 if "forked" in str(error) else 4)
        os._exit(5)
    process.found["forked"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def works(process: Process) -> None:
    """Run all that must work, twice: the second time in other process groups."""
    with process.together():
        _values(process)
        if process.size == 3:
            _groups(process)
            _gradients(process)
            _of_the_default_group(process)
            _forked(process)
    gc.collect()
    process.found["connections left"] = len(process_groups._made)
    process.found["members of nothing"] = members(EVERYONE)
    assert gather_ranks(torch.ones(1), "norm forward") is None
    with process.together():
        process.found["again"] = gather(packet_of(process.rank, (5,)), EVERYONE, "again")
    _register_renamed()
    with process.together("renamed"):
        found = [f(packet_of(process.rank, (2, 3, 4)), EVERYONE, "other") for f in (gather, add)]
        process.found["other backend"] = found


def _register_renamed() -> None:
    """Register Gloo under another name: to us another backend, whose collectives we call as of any."""

    def create(store: Any, rank: int, size: int, timeout: Any) -> Any:
        return distributed.distributed_c10d.ProcessGroupGloo(store, rank, size, timeout)

    distributed.Backend.register_backend("renamed", create, devices=["cpu"])


def share(label: str, length: int = 5) -> Tensor:
    """Gather something of a length."""
    return gather(torch.zeros(length, dtype=torch.float64), EVERYONE, label)


def _skips(process: Process, length: int, act: Callable[..., Tensor] = gather) -> None:
    share("first")
    if process.rank != 1:
        share("skipped")
    else:
        act(torch.zeros(length, dtype=torch.float64), EVERYONE, "next")


def _sleeps(process: Process) -> None:
    """Rank 2 still waits for rank 1 when rank 0 gives up: it would do so for long, if nobody told it."""
    share("first")
    if process.rank == 1:
        process.hear("gave up", 0, 2)
        share("waits")
    elif process.rank == 0:
        be_impatient()
        process.hear("begins", 2)
        process.give_up("waits")
    else:
        process.tell("begins")
        process.give_up("waits")


def _elsewhere(process: Process) -> None:
    share("first")
    if process.rank == 1:
        distributed.barrier()
        share("waits")
    else:
        be_impatient()
        process.give_up("waits")


def _late(process: Process) -> None:
    """As `_sleeps`, where there are no connections yet."""
    if process.rank == 1:
        process.hear("gave up", 0, 2)
        share("first of all")
    elif process.rank == 0:
        be_impatient()
        process.hear("begins", 2)
        process.give_up("first of all")
    else:
        process.tell("begins")
        process.give_up("first of all")


def fails(process: Process) -> None:
    """Run all that must fail on every rank, and soon."""
    scenarios: dict[str, Callable[[], None]] = {
        "same length": lambda: _skips(process, 5),
        "shorter": lambda: _skips(process, 2),
        "longer": lambda: _skips(process, 4097),
        "other act": lambda: _skips(process, 5, add),
        "sleeps": lambda: _sleeps(process),
        "elsewhere": lambda: _elsewhere(process),
        "late": lambda: _late(process),
    }
    wait_for_answers((0, 2))
    for name, act in scenarios.items():
        with process.together():
            process.attempt(name, act)
            if name == "elsewhere" and process.rank != 1:
                distributed.barrier()  # that of rank 1
            process.attempt(f"{name}, once more", lambda: share("later"))
    with process.together():
        process.found["healed"] = share("healed")
    _register_renamed()
    with process.together("renamed"):
        process.attempt("other backend", lambda: _skips(process, 5))


def logs(process: Process) -> None:
    """Wait for a rank that does not come: what was sent last is logged while the backend still waits."""
    logged: list[str] = []

    def note(record: logging.LogRecord) -> None:
        logged.append(record.getMessage())
        process.tell("logs")

    handler = logging.Handler()
    handler.emit = note  # type: ignore[method-assign]
    logging.getLogger("batchnorm").addHandler(handler)
    process.found["overdue"] = exchange._PENDING_FRACTION
    exchange._PENDING_FRACTION = SHORT / PATIENCE
    _register_renamed()
    with process.together("renamed"):
        share("first")
        share("features.3 forward")
        if process.rank == 1:
            process.hear("logs", 0)
        process.attempt("waits", lambda: share(f"features.{4 + process.rank} forward"))
        process.found["log"] = logged


def _store_of_rank_0(process: Process) -> Any:
    """Return a store that rank 0 takes with it, at a port that it finds free."""
    place, host = process.folder / "port", "127.0.0.1"
    if process.rank == 0:
        store = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        place.with_suffix(".new").write_text(str(store.port))
        place.with_suffix(".new").rename(place)
        return store
    while not place.exists():
        time.sleep(0.01)
    return distributed.TCPStore(host, int(place.read_text()), timeout=timedelta(seconds=PATIENCE))


def is_killed(process: Process) -> None:
    """Lose rank 1 in the midst of it, or rank 0, which holds the store."""
    victim = int((process.folder / "victim").read_text())
    wait_for_answers([rank for rank in range(process.size) if rank != victim])
    store = _store_of_rank_0(process)
    distributed.init_process_group("gloo", store=store, rank=process.rank, world_size=process.size)
    share("first")
    if process.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    process.attempt("waits", lambda: share("features.3 forward"))
    torch.save(process.found, process.folder / f"found{process.rank}.pt")
    if process.rank == 0:
        process.hear("has ended", 2)  # the store is there until it has
    elif victim != 0:
        process.tell("has ended")
    os._exit(0)  # torch.distributed has nothing to end in order any more


def main(rank: int, size: int, what: str, folder: Path) -> None:
    """Do one of the above."""
    process = Process(rank, size, folder)
    {"works": works, "fails": fails, "logs": logs, "is_killed": is_killed}[what](process)
    torch.save(process.found, folder / f"found{rank}.pt")
