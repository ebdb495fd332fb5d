"""Computes where a program's tiles have their values; see partition.py for the layouts. Offsets are int64."""

from __future__ import annotations

import triton
import triton.language as tl

# Arguments that no kernel is specialized on. It is on channels and positions, whether they are multiples of
# 16.
NUMBERS = ("units", "group_units", "groups", "parts", "tiles", "span", "size")


@triton.jit
def task_of(channels, parts, ROWS: tl.constexpr, INNER: tl.constexpr):
    """Returns this program's part, group, and channels: `[1, INNER]` of rows; of planes, a number."""
    program = tl.program_id(0)
    if ROWS:
        blocks = tl.cdiv(channels, INNER)
        channel = program % blocks * INNER + tl.arange(0, INNER)[None, :]
        rest = program // blocks
    else:
        channel = program % channels
        rest = program // channels
    return (rest % parts).to(tl.int64), (rest // parts).to(tl.int64), channel


@triton.jit
def merge_of(channels, CHANNELS: tl.constexpr):
    """Returns the group and the channels, `[1, CHANNELS]`, of a program that merges parts."""
    blocks = tl.cdiv(channels, CHANNELS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return (tl.program_id(0) // blocks).to(tl.int64), channel


@triton.jit
def tile_of(
    tile,
    program,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Returns the offsets of a tile's values, which are in the tensor, and which of these the mask leaves in.

    Args:
        tile: its number in the group, int64.
        program: (group, channel, mask, shape). group and channel are what `task_of` returned. mask is None,
            or a byte per unit (rows) or per unit and position (planes), 0 where values do not count. shape
            is (channels, positions, units, group_units), as in partition.py.
        EVEN: whether there is no mask, and all values of all tiles are in the tensor; no offset is compared
            with a bound then.
    """
    group, channel, mask, shape = program
    channels, positions, units, group_units = shape
    first = group * group_units
    last = tl.minimum(first + group_units, units)
    if ROWS:
        unit = first + tile * OUTER + tl.arange(0, OUTER)[:, None]
        offsets = (unit // positions * channels + channel) * positions + unit % positions
        inside = (unit < last) & (channel < channels)
        valid = inside
        if mask is not None:
            valid = inside & (tl.load(mask + unit, mask=unit < last, other=0) != 0)
    else:
        blocks = tl.cdiv(positions, INNER)
        unit = first + tile // blocks * OUTER + tl.arange(0, OUTER)[:, None]
        position = tile % blocks * INNER + tl.arange(0, INNER)[None, :]
        offsets = (unit * channels + channel) * positions + position
        inside = (unit < last) & (position < positions)
        valid = inside
        if mask is not None:
            valid = inside & (tl.load(mask + unit * positions + position, mask=inside, other=0) != 0)
    if EVEN:
        inside = tl.full([OUTER, INNER], 1, tl.int1)
        valid = inside
    return offsets, inside, valid


@triton.jit
def values_of(tensor, offsets, valid, REAL: tl.constexpr):
    """Returns a tile's values in the dtype of the arithmetic, 0 where they are not valid."""
    return tl.load(tensor + offsets, mask=valid, other=0.0).to(REAL)


@triton.jit
def total(values, ROWS: tl.constexpr):
    """Returns sums per channel, in the shape that `task_of` returns channels in."""
    if ROWS:
        sums = tl.sum(values, 0, keep_dims=True)
    else:
        sums = tl.sum(tl.sum(values, 1), 0)
    return sums


@triton.jit
def is_any(flags, ROWS: tl.constexpr):
    """Returns whether any channel's flag is set."""
    numbers = tl.where(flags, 1, 0)
    if ROWS:
        numbers = tl.max(tl.max(numbers, 1), 0)
    return numbers > 0
