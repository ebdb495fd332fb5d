"""Decides how a tensor is cut into programs, by its shape and layout alone, so that every run gives the same.

A tile is `[outer, inner]` values. The layouts:

    planes    a channel's values are runs of `positions`: a tile is some samples by some of these
    rows      a tile is some rows by some channels. A row is one position of one sample: channels-last and
              `[N, C]`; and short planes, whose runs would leave most of a tile empty

There are two regimes. Where a channel has few values in a group, one program takes them all, and computes
everything in one launch: a single tile stays in registers; several tiles are read twice, the second time from
the cache. Otherwise programs take parts, a second launch merges their results, and a third one normalizes.

The numbers below are estimates, not measurements: no GPU has run these kernels yet.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from batchnorm.kernels.layout import is_dense

_SINGLE = 2**13  # values of a tile that stays in registers: 16 per thread of 16 warps, and as many of dy
_WHOLE = 2**16  # values of several tiles that one program takes, if there are _ENOUGH programs
_ENOUGH = 128  # a large GPU has about 132 multiprocessors
_TILE = 2**11  # values of a tile otherwise: 8 per thread, one load of 16 bytes of 16-bit values
_LANE = 32  # tiles of a part at most, which is how many values a lane adds up in float32
_SHORT = 16  # positions below which planes are read as rows
# Channels of a tile of rows: 16-bit values of a sector at least, and of a cache line at most.
_SEGMENT, _LINE = 16, 64
_PROGRAMS = 1024  # that fill a large GPU several times
_TILES = 8  # tiles of a program that only normalizes or differentiates, with parameters loaded once
_MERGED, _BLOCK = 2**11, 512  # numbers of a tile that merges, and its parts, at most


class Partition(NamedTuple):
    """A call's programs.

    Attributes:
        is_dense: whether the tensor has one of the layouts that there are kernels for. If not, the other
            attributes are those of a contiguous tensor.
        rows: whether the layout is rows; else it is planes.
        channels: C.
        positions: values of a run: S for planes and short planes; else 1.
        units: number of samples for planes, of rows for rows.
        group_units: units of a statistics group; the last group may have fewer.
        groups: G.
        is_whole: whether one program takes all values of a channel and a group.
        outer, inner: sizes of a tile, powers of two.
        channel_tiles: number of tiles along the channels.
        tiles: number of tiles of a group, for the channels of one tile.
        part_tiles: number of tiles of a part, for moments and sums.
        is_even: whether all values of all tiles and parts are in the tensor.
    """

    is_dense: bool
    rows: bool
    channels: int
    positions: int
    units: int
    group_units: int
    groups: int
    is_whole: bool
    outer: int
    inner: int
    channel_tiles: int
    tiles: int
    part_tiles: int
    is_even: bool

    @property
    def parts(self) -> int:
        """Number of parts of a group for moments and sums."""
        return math.ceil(self.tiles / self.part_tiles)

    @property
    def warps(self) -> int:
        """Number of warps of a program: 8 values per thread; 16 in the largest tiles, which are read once."""
        return max(1, min(16, self.outer * self.inner // 256))

    @property
    def step_tiles(self) -> int:
        """Number of tiles of a part where each value is read once; parts are enough to fill the device."""
        return _step_tiles(self.tiles, self.channel_tiles * self.groups)


@functools.lru_cache(maxsize=4096)
def partition(shape: tuple[int, ...], stride: tuple[int, ...], group_size: int | None) -> Partition:
    """Returns the programs for a tensor `[N, C, *S]` that is not empty.

    Args:
        shape, stride: shape and stride of the tensor.
        group_size: samples per statistics group; None = all.
    """
    axes = range(len(shape))
    contiguous = is_dense(shape, stride, axes)
    channels_last = not contiguous and is_dense(shape, stride, (0, *axes[2:], 1))
    samples, channels, positions = shape[0], shape[1], math.prod(shape[2:])
    group = samples if group_size is None else min(group_size, samples)
    groups = math.ceil(samples / group)
    rows = channels_last or positions < _SHORT
    if rows:
        units, length, run = samples * positions, group * positions, 1 if channels_last else positions
        outer, inner = _tile_of_rows(length, channels)
        channel_tiles, tiles = math.ceil(channels / inner), math.ceil(length / outer)
    else:
        units, length, run = samples, group, positions
        outer, inner = _tile_of_planes(group, positions)
        channel_tiles, tiles = channels, math.ceil(group / outer) * math.ceil(positions / inner)
    programs, values = channel_tiles * groups, tiles * outer * inner
    is_whole = tiles == 1 or (tiles <= _LANE and values <= _WHOLE and programs >= _ENOUGH)
    wanted = max(1, min(tiles, _PROGRAMS // programs))
    part_tiles = _fitting(tiles, min(_LANE, math.ceil(tiles / wanted)))
    fits = length % outer == 0 and (channels if rows else positions) % inner == 0 and samples % group == 0
    is_even = fits and tiles % part_tiles == 0 and tiles % _step_tiles(tiles, programs) == 0
    return Partition(
        contiguous or channels_last,
        rows,
        channels,
        run,
        units,
        length,
        groups,
        is_whole,
        outer,
        inner,
        channel_tiles,
        tiles,
        part_tiles,
        is_even,
    )


def power(number: int) -> int:
    """Returns the smallest power of two that is not less than `number`."""
    return 1 << (number - 1).bit_length()


def _fitting(tiles: int, wanted: int) -> int:
    """Returns the largest divisor of `tiles` from wanted / 4 to `wanted`; `wanted` if there is none."""
    fewer = (number for number in range(wanted, wanted // 4, -1) if tiles % number == 0)
    return next(fewer, wanted)


def _step_tiles(tiles: int, programs: int) -> int:
    return _fitting(tiles, max(1, min(_TILES, tiles * programs // _PROGRAMS)))


def _tile_of_rows(length: int, channels: int) -> tuple[int, int]:
    """Returns rows and channels of a tile, which holds all `length` rows if it can."""
    outer, widest = power(length), min(_LINE, power(channels))
    narrowest = min(_SEGMENT, widest)
    if outer * narrowest <= _SINGLE:
        return outer, max(narrowest, min(widest, _TILE // outer))
    return max(1, min(outer, _TILE // widest)), widest


def _tile_of_planes(samples: int, positions: int) -> tuple[int, int]:
    """Returns samples and positions of a tile, which holds all of them if it can."""
    outer, inner = power(samples), power(positions)
    if outer * inner <= _SINGLE:
        return outer, inner
    even = positions & -positions  # the largest power of two that divides them
    inner = min(even if even >= _LINE else inner, _TILE)
    return max(1, min(outer, _TILE // inner)), inner


def merging(parts: int, channels: int) -> tuple[int, int]:
    """Returns the parts and the channels of a tile that merges, powers of two."""
    block = min(_BLOCK, power(parts))
    return block, max(1, min(power(channels), 32, _MERGED // block))
