"""The kernels compiled, each on its first use; on disk they stay for the next process."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import cfunc, types
from numba.core import event

from . import groups, planes, rows, running, statistics
from .access import finished, number_finished, take_number
from .kernel_args import FINISHED, NEXT, read
from .on_disk import Kept
from .vector import FULL, SIMPLE, function, part_of_one

_log = logging.getLogger("batchnorm")
_WORK = types.void(types.intp)

# Files in which nothing is compiled.
_PLAIN_PYTHON = frozenset({"engine", "huge_pages", "on_disk", "parallel", "partition", "prepared"})

# dtype of a tensor -> what its values are in memory (vector.py), and the dtype of the arithmetic.
KINDS: dict[torch.dtype, tuple[type, type]] = {
    torch.float32: (np.float32, np.float32),
    torch.float64: (np.float64, np.float64),
    torch.float16: (np.int16, np.float32),
    torch.bfloat16: (np.uint16, np.float32),
}


@part_of_one
def _work(body: Any, merge: Any, end: Any, address: Any, kind: Any, real: Any, how: Any) -> None:
    """Do tasks until there is none that nobody has taken: the first pass's, the merging ones, the second's.

    Who gets a task of a later pass waits for the earlier ones; these are taken already, so they end. Who ends
    the last one does what comes at the end.
    """
    args = read(address)
    if args.takes:  # every thread writes the same numbers, so none waits for another
        running.take_running(args, real)
    tasks, merges, workspace = args.tasks, args.merges, np.empty(args.workspace, np.uint8)
    index = take_number(address + NEXT)
    while index < args.total:
        before = 0 if index < tasks else tasks if index < tasks + merges else tasks + merges
        while before and number_finished(address + FINISHED) < before:
            pass
        if before == tasks and merges:
            merge(args, index - before, real)
        else:
            measures, applies = args.measure, args.apply
            if merges:
                measures, applies = before == 0, before > 0
            body(args, index - before, measures, applies, workspace, kind, real, how)
        if finished(address + FINISHED) == args.total - 1:
            end(args, real)
        index = take_number(address + NEXT)


@function
def _close(close: Any, end: Any, address: Any, real: Any) -> None:
    """Do tasks that put groups together until all are taken, and then what comes at the end."""
    args = read(address)
    index = take_number(address + NEXT)
    while index < args.total:
        close(args, index, real)
        if finished(address + FINISHED) == args.total - 1:
            end(args, real)
        index = take_number(address + NEXT)


# What a thread runs, given the address of a args. `source` is never 0: it is there to be part of the
# function, of which Numba asks if it is on disk; of the functions that this one calls, it does not ask.
# One by one, since a function that held another compiled one as a variable would never be found on disk.


def _planes_forward(kind: Any, real: Any, how: Any, source: int) -> Any:
    def planes_forward(args):  # type: ignore[no-untyped-def]
        if source:
            _work(planes.forward, statistics.merge_moments, running.move_running, args, kind, real, how)

    return planes_forward


def _planes_backward(kind: Any, real: Any, how: Any, source: int) -> Any:
    def planes_backward(args):  # type: ignore[no-untyped-def]
        if source:
            _work(planes.backward, statistics.merge_sums, running.move_nothing, args, kind, real, how)

    return planes_backward


def _rows_forward(kind: Any, real: Any, how: Any, source: int) -> Any:
    def rows_forward(args):  # type: ignore[no-untyped-def]
        if source:
            _work(rows.forward, statistics.merge_moments, running.move_running, args, kind, real, how)

    return rows_forward


def _rows_backward(kind: Any, real: Any, how: Any, source: int) -> Any:
    def rows_backward(args):  # type: ignore[no-untyped-def]
        if source:
            _work(rows.backward, statistics.merge_sums, running.move_nothing, args, kind, real, how)

    return rows_backward


def _groups_forward(kind: Any, real: Any, how: Any, source: int) -> Any:
    del kind, how

    def groups_forward(args):  # type: ignore[no-untyped-def]
        if source:
            _close(groups.pool, groups.move_running, args, real)

    return groups_forward


def _groups_backward(kind: Any, real: Any, how: Any, source: int) -> Any:
    del kind, how

    def groups_backward(args):  # type: ignore[no-untyped-def]
        if source:
            _close(groups.set_parameters, running.move_nothing, args, real)

    return groups_backward


_KERNELS: dict[str, Callable[[Any, Any, Any, int], Any]] = {
    "planes_forward": _planes_forward,
    "planes_backward": _planes_backward,
    "rows_forward": _rows_forward,
    "rows_backward": _rows_backward,
    "groups_forward": _groups_forward,
    "groups_backward": _groups_backward,
}


class _Announcer(event.Listener):
    """Says, once in a process, why the first call takes long; on a kernel that is on disk it is silent."""

    def __init__(self) -> None:
        self.is_silent = False

    def on_start(self, event: Any) -> None:
        del event
        if not self.is_silent:
            self.is_silent = True
            _log.info("compiling the kernels for CPUs: some seconds each, once, as they stay on disk")

    def on_end(self, event: Any) -> None:
        del event


_announcer = _Announcer()


@functools.cache
def source() -> int:
    """Return a number that changes with the text of any kernel."""
    paths = sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem not in _PLAIN_PYTHON)
    text = b"".join(path.read_bytes() for path in paths)
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big") | 1


@functools.cache
def kernel(name: str, dtype: torch.dtype, simple: bool) -> int:
    """Return the address of a kernel, which compiles it where nobody has before.

    Args:
        name: of `_KERNELS`.
        dtype: of the tensors.
        simple: whether for calls without a mask, and at most bounds as an activation.
    """
    kind, real = KINDS[dtype]
    entry = _KERNELS[name](kind, real, SIMPLE if simple else FULL, source())
    made: Any = Kept(entry, (_WORK.args, _WORK.return_type), locals={}, options={"error_model": "numpy"})
    with event.install_listener("numba:compile", _announcer):
        try:
            made.enable_caching()
            made.compile()
        except Exception:  # no folder that can be written to, or as bad: compiled again in every process
            made = cfunc(_WORK, error_model="numpy")(entry)
    return int(made.address)
