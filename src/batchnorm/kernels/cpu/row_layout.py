"""Computes where a block of rows has its values, to which channels they belong, and a thread's workspace.

rows.py reads x as rows of `columns` values, each of one unit or several. A task has a block of these columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .access import size_of, store
from .elementwise import PARAMETERS, some
from .kernel_args import is_valid, table
from .llvm import LANES
from .vector import function, is_simple, splat, total

# Rows of the workspace's table of columns: centers, two rows of sums, and the parameters of elementwise.py.
CENTERS, SUMS, GIVEN = 0, 1, 3
# Rows of its table of channels: mean and m2, two rows of sums, centers, and what rounding left of the means.
# The parameters of elementwise.py, too, are first computed per channel: in rows 0 to 6, when these are no
# longer used.
MOMENTS, CHANNEL_SUMS, CHANNEL_CENTERS, REST = 0, 2, 4, 7
PER_COLUMN, PER_CHANNEL = GIVEN + PARAMETERS, 8  # numbers of rows


class Columns(NamedTuple):
    """A block of columns, and the channels that these belong to.

    Attributes:
        first: index of the block's first column in a row.
        width: number of columns.
        channel: index of the first channel.
        channels: number of channels.
        repeats: columns of each channel; number r of channel c is column c * apart + r * step of the block.
        apart, step: see repeats.
    """

    first: Any
    width: Any
    channel: Any
    channels: Any
    repeats: Any
    apart: Any
    step: Any


@function
def task_of(args: Any, index: Any) -> Any:
    """Returns a task's part, its first group, the end of its groups, and its block of columns."""
    rest, block = divmod(index, (args.columns + args.block - 1) // args.block)
    part, group = divmod(rest, (args.groups + args.span - 1) // args.span)
    first = block * args.block
    columns = _columns_of(args, first, min(args.block, args.columns - first))
    return part, group * args.span, min(args.groups, (group + 1) * args.span), columns


@function
def _columns_of(args: Any, first: Any, width: Any) -> Any:
    """Returns the block of `width` columns from `first` on."""
    channel, channels, repeats, apart, step = first, width, 1, 1, 0
    if args.positions > 1:
        channel, channels = first // args.positions, width // args.positions
        repeats, apart, step = args.positions, args.positions, 1
    elif args.columns > args.channels:
        channel, channels, repeats, step = 0, args.channels, args.columns // args.channels, args.channels
    return Columns(first, width, channel, channels, repeats, apart, step)


@function
def units_of(args: Any, part: Any, group: Any) -> Any:
    """Returns the first unit of a part of a group, and the end of its units."""
    unit = group * args.group_units
    units = min(args.units, unit + args.group_units) - unit
    return unit + units * part // args.parts, unit + units * (part + 1) // args.parts


@function
def tables(workspace: Any, columns: Any, real: Any) -> Any:
    """Returns the workspace's tables: per column, with LANES numbers to spare, and per channel, in float64.

    A thread allocates its workspace once, since that takes longer than a small task.
    """
    wide = columns.width + LANES
    by_column = table(workspace, 0, PER_COLUMN, wide, real)
    start = PER_COLUMN * wide * size_of(real)
    return by_column, table(workspace, start, PER_CHANNEL, columns.channels, np.float64)


@function
def spread(values: Any, columns: Any, row: Any, real: Any) -> None:
    """Writes each channel's value, rounded, to its columns of a row that has LANES numbers to spare."""
    channels, repeats, step = columns.channels, columns.repeats, columns.step
    if step == 1:
        for channel in range(channels):
            address = row.ctypes.data + channel * columns.apart * size_of(real)
            value = splat(values[channel], real)
            for repeat in range(0, repeats, LANES):
                store(value, address + repeat * size_of(real), real)
    else:
        for repeat in range(repeats):
            part = row[repeat * step : repeat * step + channels]  # a slice's indices are known to be positive
            for channel in range(channels):
                part[channel] = values[channel]


@function
def gather(row: Any, columns: Any, values: Any, real: Any) -> None:
    """Writes the sum of each channel's columns in a row to `values`."""
    channels, repeats, step = columns.channels, columns.repeats, columns.step
    if step == 1:
        for channel in range(channels):
            address = row.ctypes.data + channel * columns.apart * size_of(real)
            lanes = splat(0.0, real)
            for repeat in range(0, repeats, LANES):
                more = some(address + repeat * size_of(real), repeats - repeat, splat(0.0, real), real)
                lanes = lanes + more
            values[channel] = total(lanes)
    else:
        for channel in range(channels):
            values[channel] = 0.0
        for repeat in range(repeats):
            part = row[repeat * step : repeat * step + channels]
            for channel in range(channels):
                values[channel] += np.float64(part[channel])


@function
def units_in_a_row(args: Any) -> Any:
    """Returns how many units make a row."""
    return args.columns // (args.channels * args.positions)


@function
def place_of(args: Any, unit: Any, column: Any) -> Any:
    """Returns the index in the tensor of the value at a column of the row that begins with `unit`."""
    return unit * args.channels * args.positions + column


@function
def columns_in(args: Any, unit: Any, end: Any, columns: Any) -> Any:
    """Returns the columns of a block in the row that begins with `unit`: fewer in a group's last row."""
    return min(columns.first + columns.width, (end - unit) * args.channels * args.positions) - columns.first


@function
def is_in(args: Any, unit: Any, variant: Any) -> Any:
    """Returns whether the mask leaves a unit in."""
    return is_simple(variant) or is_valid(args, unit)


@function
def valid_values(args: Any, unit: Any, end: Any, variant: Any) -> Any:
    """Returns how many values per channel the mask leaves in, of units `unit` to `end`."""
    if is_simple(variant) or not args.mask:
        return np.float64((end - unit) * args.positions)
    found = 0
    for one in range(unit, end):
        found += 1 if is_in(args, one, variant) else 0
    return np.float64(found)
