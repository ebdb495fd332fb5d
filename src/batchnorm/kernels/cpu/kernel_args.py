"""Defines a kernel's arguments: one record of addresses and numbers, filled in Python, read in the kernel."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numba import carray

from .access import LINE, pointer
from .vector import function

# Addresses, 0 where there is none. Tensors are dense; statistics are float64, `[G, C]`.
_ADDRESSES = (
    "statistics",  # count `[G]`, mean, m2, rstd; the four are found from here, where it is given
    "scratch",  # further memory of a pass; `locate_moments` and `locate_sums` say what lies where
    "x",
    "y",
    "residual",
    "dy",
    "dx",
    "dresidual",
    "mask",  # bytes, one per sample and position
    "weight",  # `[C]`, in the dtype of the arithmetic
    "bias",
    "dweight",  # `[C]`, in the dtype of the arithmetic
    "dbias",
    "running_mean",  # `[C]`
    "running_var",
    "batches",  # one whole number
    "skipped",  # one whole number
    "pooled_mean",  # `[C]`, of several groups: see groups.py
    "pooled_m2",
    "count",  # `[G]`
    "mean",
    "m2",
    "sum_dy",
    "sum_dy_xhat",
    "rstd",
    "part_count",  # of each part, `[parts, G]`, the others `[parts, G, C]`; the same where there is one part
    "part_mean",
    "part_m2",
    "part_dy",
    "part_dy_xhat",
    "a",  # coefficients of dx = a dy' + b x̂ + c
    "b",
    "c",
)
_NUMBERS = (
    "channels",
    "positions",  # S: values of one channel that lie side by side; 1 where channels do
    "groups",
    "units",  # samples where a channel's values lie side by side, samples times positions where channels do
    "group_units",  # units of a group; the last one may have fewer
    "parts",  # a group is cut into so many tasks, of about as many units each
    "span",  # groups of a task
    "workspace",  # bytes that a thread needs to compute in
    "local",  # bytes of statistics and scratch that the only thread of a small call takes from its own memory
    "columns",  # rows only: values in a row; a row may hold several units
    "block",  # columns of a task; of planes: channels
    "planes",  # of a task that goes through the tensor as it lies in memory; 0 where a task is of one channel
    "measure",  # whether to take statistics, or the sums of the gradient
    "apply",  # whether to write y, or dx
    "constant",  # whether mean and rstd do not depend on x
    "stream",  # whether y or dx is written past the caches
    "activation",  # see activations.py
    "moves",  # whether running statistics move at the end
    "takes",  # whether mean and rstd are those of the running statistics, and written first
    "sequential",  # whether each group moves them in turn
    "spoiled",  # whether a group's moments are not finite, where `skipped` is given
    "tasks",  # of a pass over the tensor
    "merges",  # tasks that merge the parts' statistics between two passes; 0 where there is one pass
    "total",  # tasks in all
)
_REALS = (
    "eps",
    "momentum",
    "low",  # an activation that only clamps does so to low..high; NaN = no bound
    "high",
    "low_kink",  # and its derivative is 0 outside of these
    "high_kink",
)


_COUNTERS = (
    "next",  # the first task that no thread has taken
    "finished",  # number of tasks that are done, of several passes
)


class KernelArgs(ctypes.Structure):
    """The record as Python fills it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (*_ADDRESSES, *_NUMBERS)),
        *((name, ctypes.c_double) for name in _REALS),
        # All threads write to the counters; whatever is in their cache line is fetched again each time.
        ("_gap", ctypes.c_byte * LINE),
        *((name, ctypes.c_int64) for name in _COUNTERS),
        ("_end", ctypes.c_byte * LINE),
    )


_NAMES = (*_ADDRESSES, *_NUMBERS, *_REALS, *_COUNTERS)
_RECORD = np.dtype(
    {
        "names": _NAMES,
        "formats": [np.float64 if name in _REALS else np.int64 for name in _NAMES],
        "offsets": [getattr(KernelArgs, name).offset for name in _NAMES],
        "itemsize": ctypes.sizeof(KernelArgs),
    }
)


NEXT, FINISHED = KernelArgs.next.offset, KernelArgs.finished.offset  # bytes from the record's address


@function
def read(address: Any) -> Any:
    """Returns the record at an address."""
    return carray(pointer(address), (1,), _RECORD)[0]


@function
def locate_moments(args: Any, local: Any) -> None:
    """Sets the addresses of statistics, and of parts' moments, from those of their memory.

    All threads of a call write the same numbers. Scratch: part_count `[parts, G]`, part_mean, part_m2.

    Args:
        args: the call's arguments.
        local: memory of the call's only thread, for a call without memory of its own.
    """
    groups, size = args.groups, args.groups * args.channels
    _locate_statistics(args, args.statistics if args.statistics else local)
    if args.parts == 1:
        args.part_count, args.part_mean, args.part_m2 = args.count, args.mean, args.m2
    else:
        args.part_count = args.scratch
        args.part_mean = args.part_count + 8 * args.parts * groups
        args.part_m2 = args.part_mean + 8 * args.parts * size


@function
def locate_sums(args: Any, local: Any) -> None:
    """Sets the addresses of statistics, and of the gradient's sums and coefficients, as `locate_moments`.

    Scratch: part_count `[parts, G]`; a, b, c, sum_dy, sum_dy_xhat; of several parts, part_dy, part_dy_xhat.
    """
    groups, size = args.groups, args.groups * args.channels
    if args.statistics:
        _locate_statistics(args, args.statistics)
    scratch = args.scratch if args.scratch else local
    if not scratch:
        return
    args.part_count = scratch
    args.a = scratch + 8 * args.parts * groups
    args.b = args.a + 8 * size
    args.c = args.b + 8 * size
    args.sum_dy = args.c + 8 * size
    args.sum_dy_xhat = args.sum_dy + 8 * size
    if args.parts == 1:
        args.part_dy, args.part_dy_xhat = args.sum_dy, args.sum_dy_xhat
    else:
        args.part_dy = args.sum_dy_xhat + 8 * size
        args.part_dy_xhat = args.part_dy + 8 * args.parts * size


@function
def _locate_statistics(args: Any, statistics: Any) -> None:
    if statistics:
        args.count = statistics
        args.mean = args.count + 8 * args.groups
        args.m2 = args.mean + 8 * args.groups * args.channels
        args.rstd = args.m2 + 8 * args.groups * args.channels


@function
def numbers(address: Any, size: Any) -> Any:
    """Returns `size` float64 numbers at an address, as an array; nothing is copied."""
    return carray(pointer(address), (size,), np.float64)


@function
def table(workspace: Any, start: Any, rows: Any, columns: Any, real: Any) -> Any:
    """Returns a part of a thread's workspace as a table, from byte `start` on."""
    return carray(pointer(workspace.ctypes.data + start), (rows, columns), real)


@function
def plain(value: Any) -> Any:
    """Returns a number; for any NaN, NumPy's own (see `access._narrowed`)."""
    return value if value == value else np.nan


@function
def parameter(address: Any, channel: Any, missing: Any, real: Any) -> Any:
    """Returns a channel's weight or bias in float64; `missing` where there is none."""
    if address == 0:
        return missing
    return plain(np.float64(carray(pointer(address), (channel + 1,), real)[channel]))


@function
def set_parameter(address: Any, channel: Any, value: Any, real: Any) -> None:
    """Writes a channel's number, in the dtype of the arithmetic; nothing where there is no address."""
    if address:
        carray(pointer(address), (channel + 1,), real)[channel] = value


@function
def is_valid(args: Any, unit: Any) -> Any:
    """Returns whether the mask, of one byte per unit, leaves a unit in."""
    return args.mask == 0 or carray(pointer(args.mask), (unit + 1,), np.uint8)[unit] != 0


@function
def clear(table: Any) -> None:
    """Sets a table's numbers to 0; NumPy's own spelling takes Numba a second to compile."""
    for row in range(table.shape[0]):
        for column in range(table.shape[1]):
            table[row, column] = 0
