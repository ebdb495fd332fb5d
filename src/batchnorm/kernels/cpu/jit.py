"""Compiles each kernel on its first use, and keeps it on disk for the next process."""

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
from .compile_cache import Kept
from .kernel_args import FINISHED, NEXT, locate_moments, locate_sums, read
from .vector import FULL, SIMPLE, Variant, function, part_of_one

_log = logging.getLogger("batchnorm")
_WORK = types.void(types.intp)

# Files in which nothing is compiled.
_PLAIN_PYTHON = frozenset(
    {"engine", "huge_pages", "compile_cache", "parallel", "partition", "plain_call", "prepared_launch"}
)

# dtype of a tensor -> NumPy type of its values in memory (access.py), and the dtype of the arithmetic.
DTYPES: dict[torch.dtype, tuple[type, type]] = {
    torch.float32: (np.float32, np.float32),
    torch.float64: (np.float64, np.float64),
    torch.float16: (np.int16, np.float32),
    torch.bfloat16: (np.uint16, np.float32),
}


@part_of_one
def _work(
    locate: Any, body: Any, merge: Any, end: Any, address: Any, dtype: Any, real: Any, features: Any
) -> None:
    """Runs tasks until all are taken: first those of the first pass, then the merges, then the second pass.

    A thread with a task of a later pass waits until all tasks of the earlier ones are finished; other threads
    run these already, so the wait ends. The thread that finishes the last task calls `end`.
    """
    variant = Variant(dtype, real, features)
    args = read(address)
    tasks, merges, workspace = args.tasks, args.merges, np.empty(args.workspace + args.local, np.uint8)
    # Every thread writes the same numbers, so that none waits for another.
    locate(args, workspace.ctypes.data + args.workspace if args.local else 0)
    if args.takes:
        running.take_running(args, real)
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
            body(args, index - before, measures, applies, workspace, variant)
        if finished(address + FINISHED) == args.total - 1:
            end(args, real)
        index = take_number(address + NEXT)


@function
def _close(close: Any, end: Any, address: Any, real: Any) -> None:
    """Runs tasks that merge groups until all are taken; the thread that finishes the last one calls `end`."""
    args = read(address)
    index = take_number(address + NEXT)
    while index < args.total:
        close(args, index, real)
        if finished(address + FINISHED) == args.total - 1:
            end(args, real)
        index = take_number(address + NEXT)


# The functions that a thread runs, given the address of a call's arguments. Numba looks for a compiled
# function on disk by the function's own code and constants, not by those of the functions that it calls:
# `source`, which changes with these and is never 0, is one of its constants. There is one function per
# kernel, since Numba never finds a function on disk that has another compiled function as a constant.


def _planes_forward(dtype: Any, real: Any, features: Any, source: int) -> Any:
    def planes_forward(args):  # type: ignore[no-untyped-def]
        if source:
            merge, end = statistics.merge_moments, running.move_running
            _work(locate_moments, planes.forward, merge, end, args, dtype, real, features)

    return planes_forward


def _planes_backward(dtype: Any, real: Any, features: Any, source: int) -> Any:
    def planes_backward(args):  # type: ignore[no-untyped-def]
        if source:
            merge, end = statistics.merge_sums, running.move_nothing
            _work(locate_sums, planes.backward, merge, end, args, dtype, real, features)

    return planes_backward


def _rows_forward(dtype: Any, real: Any, features: Any, source: int) -> Any:
    def rows_forward(args):  # type: ignore[no-untyped-def]
        if source:
            merge, end = statistics.merge_moments, running.move_running
            _work(locate_moments, rows.forward, merge, end, args, dtype, real, features)

    return rows_forward


def _rows_backward(dtype: Any, real: Any, features: Any, source: int) -> Any:
    def rows_backward(args):  # type: ignore[no-untyped-def]
        if source:
            merge, end = statistics.merge_sums, running.move_nothing
            _work(locate_sums, rows.backward, merge, end, args, dtype, real, features)

    return rows_backward


def _groups_forward(dtype: Any, real: Any, features: Any, source: int) -> Any:
    del dtype, features

    def groups_forward(args):  # type: ignore[no-untyped-def]
        if source:
            _close(groups.pool, groups.move_running, args, real)

    return groups_forward


def _groups_backward(dtype: Any, real: Any, features: Any, source: int) -> Any:
    del dtype, features

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
    """Logs, once per process, that kernels are compiled, which takes long; not for kernels on disk."""

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
    """Returns an odd number that changes with the text of any file in which something is compiled."""
    paths = sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem not in _PLAIN_PYTHON)
    text = b"".join(path.read_bytes() for path in paths)
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big") | 1


@functools.cache
def kernel(name: str, dtype: torch.dtype, simple: bool) -> int:
    """Returns the address of a kernel, compiled now if it is not on disk.

    Args:
        name: a key of `_KERNELS`.
        dtype: dtype of the tensors.
        simple: whether it is for calls without a mask and without an activation other than bounds.
    """
    stored, real = DTYPES[dtype]
    entry = _KERNELS[name](stored, real, SIMPLE if simple else FULL, source())
    made: Any = Kept(entry, (_WORK.args, _WORK.return_type), locals={}, options={"error_model": "numpy"})
    with event.install_listener("numba:compile", _announcer):
        try:
            made.enable_caching()
            made.compile()
        except Exception:  # such as no folder that can be written to: every process compiles it anew
            made = cfunc(_WORK, error_model="numpy")(entry)
    return int(made.address)
