"""Where the columns of a block of rows are, and which channel each belongs to; see rows.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from .access import size_of
from .llvm import LANES
from .packet import is_valid
from .runs import some
from .vector import function, is_simple, splat, total


@function
def task_of(packet: Any, index: Any) -> Any:
    """Return part, group, the first and last unit, and the first and last column."""
    blocks = (packet.columns + packet.block - 1) // packet.block
    rest, block = divmod(index, blocks)
    part, group = divmod(rest, packet.groups)
    unit = group * packet.group_units
    units = min(packet.units, unit + packet.group_units) - unit
    return (
        part,
        group,
        unit + units * part // packet.parts,
        unit + units * (part + 1) // packet.parts,
        block * packet.block,
        min(packet.columns, (block + 1) * packet.block),
    )


@function
def layout(packet: Any, column: Any, width: Any) -> Any:
    """Return which channels a block of columns has: the first, their number, and where their columns are.

    A channel has `repeats` columns: number r of channel c is column c * apart + r * step of the block.
    """
    if packet.positions > 1:
        return column // packet.positions, width // packet.positions, packet.positions, packet.positions, 1
    if packet.columns > packet.channels:
        return 0, packet.channels, packet.columns // packet.channels, 1, packet.channels
    return column, width, 1, 1, 0


@function
def spread(values: Any, packet: Any, column: Any, width: Any, row: Any) -> None:
    """Write each channel's value to all of its columns, rounded to the row's dtype."""
    _, channels, repeats, apart, step = layout(packet, column, width)
    for channel in range(channels):
        value = values[channel]
        for repeat in range(repeats):
            row[channel * apart + repeat * step] = value


@function
def gather(row: Any, packet: Any, column: Any, width: Any, values: Any, real: Any) -> None:
    """Add up each channel's columns."""
    _, channels, repeats, apart, step = layout(packet, column, width)
    for channel in range(channels):
        found = 0.0
        if step == 1:
            address, lanes = row.ctypes.data + channel * apart * size_of(real), splat(0.0, real)
            for repeat in range(0, repeats, LANES):
                more = some(address + repeat * size_of(real), repeats - repeat, splat(0.0, real), real)
                lanes = lanes + more
            found = total(lanes)
        else:
            for repeat in range(repeats):
                found += np.float64(row[channel * apart + repeat * step])
        values[channel] = found


@function
def units_in_a_row(packet: Any) -> Any:
    return packet.columns // (packet.channels * packet.positions)


@function
def place_of(packet: Any, unit: Any, column: Any) -> Any:
    """Return the number, in its tensor, of the value at a column of the row that begins with a unit."""
    return unit * packet.channels * packet.positions + column


@function
def columns_in(packet: Any, unit: Any, last: Any, column: Any, end: Any) -> Any:
    """Return how many columns of a block the row has that begins with a unit: the last one may be shorter."""
    return min(end, (last - unit) * packet.channels * packet.positions) - column


@function
def is_in(packet: Any, unit: Any, how: Any) -> Any:
    """Whether a unit counts."""
    return is_simple(how) or is_valid(packet, unit)


@function
def valid_values(packet: Any, unit: Any, last: Any, how: Any) -> Any:
    """Return how many values count per channel, of those units."""
    if is_simple(how) or not packet.mask:
        return np.float64((last - unit) * packet.positions)
    found = 0
    for one in range(unit, last):
        found += 1 if is_in(packet, one, how) else 0
    return np.float64(found)
