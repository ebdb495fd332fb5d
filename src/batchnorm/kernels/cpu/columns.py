"""Where the columns of a block of rows are, and which channel each belongs to; see rows.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from .access import size_of, store
from .elementwise import some
from .kernel_args import is_valid
from .llvm import LANES
from .vector import function, is_simple, splat, total


@function
def task_of(args: Any, index: Any) -> Any:
    """Return part, the first and last group, and the first and last column."""
    rest, block = divmod(index, (args.columns + args.block - 1) // args.block)
    part, group = divmod(rest, (args.groups + args.span - 1) // args.span)
    return (
        part,
        group * args.span,
        min(args.groups, (group + 1) * args.span),
        block * args.block,
        min(args.columns, (block + 1) * args.block),
    )


@function
def units_of(args: Any, part: Any, group: Any) -> Any:
    """Return the first and last unit of a part of a group."""
    unit = group * args.group_units
    units = min(args.units, unit + args.group_units) - unit
    return unit + units * part // args.parts, unit + units * (part + 1) // args.parts


@function
def layout(args: Any, column: Any, width: Any) -> Any:
    """Return which channels a block of columns has: the first, their number, and where their columns are.

    A channel has `repeats` columns: number r of channel c is column c * apart + r * step of the block.
    """
    if args.positions > 1:
        return column // args.positions, width // args.positions, args.positions, args.positions, 1
    if args.columns > args.channels:
        return 0, args.channels, args.columns // args.channels, 1, args.channels
    return column, width, 1, 1, 0


@function
def spread(values: Any, args: Any, column: Any, width: Any, row: Any, real: Any) -> None:
    """Write each channel's value to all of its columns, rounded; the row has room for LANES more."""
    _, channels, repeats, apart, step = layout(args, column, width)
    if step == 1:
        for channel in range(channels):
            value, address = splat(values[channel], real), row.ctypes.data + channel * apart * size_of(real)
            for repeat in range(0, repeats, LANES):
                store(value, address + repeat * size_of(real), real)
    else:
        for repeat in range(repeats):
            columns = row[repeat * step : repeat * step + channels]  # a slice's indices are known as positive
            for channel in range(channels):
                columns[channel] = values[channel]


@function
def gather(row: Any, args: Any, column: Any, width: Any, values: Any, real: Any) -> None:
    """Add up each channel's columns."""
    _, channels, repeats, apart, step = layout(args, column, width)
    if step == 1:
        for channel in range(channels):
            address, lanes = row.ctypes.data + channel * apart * size_of(real), splat(0.0, real)
            for repeat in range(0, repeats, LANES):
                more = some(address + repeat * size_of(real), repeats - repeat, splat(0.0, real), real)
                lanes = lanes + more
            values[channel] = total(lanes)
    else:
        for channel in range(channels):
            values[channel] = 0.0
        for repeat in range(repeats):
            columns = row[repeat * step : repeat * step + channels]
            for channel in range(channels):
                values[channel] += np.float64(columns[channel])


@function
def units_in_a_row(args: Any) -> Any:
    return args.columns // (args.channels * args.positions)


@function
def place_of(args: Any, unit: Any, column: Any) -> Any:
    """Return the number, in its tensor, of the value at a column of the row that begins with a unit."""
    return unit * args.channels * args.positions + column


@function
def columns_in(args: Any, unit: Any, last: Any, column: Any, end: Any) -> Any:
    """Return how many columns of a block the row has that begins with a unit: the last one may be shorter."""
    return min(end, (last - unit) * args.channels * args.positions) - column


@function
def is_in(args: Any, unit: Any, how: Any) -> Any:
    """Whether a unit counts."""
    return is_simple(how) or is_valid(args, unit)


@function
def valid_values(args: Any, unit: Any, last: Any, how: Any) -> Any:
    """Return how many values count per channel, of those units."""
    if is_simple(how) or not args.mask:
        return np.float64((last - unit) * args.positions)
    found = 0
    for one in range(unit, last):
        found += 1 if is_in(args, one, how) else 0
    return np.float64(found)
