"""Computes count, mean and centred second moment: of values that a program holds, and of merged parts.

Deviations are taken in the dtype of the arithmetic, from a value or a mean nearby: never E[x²] - E[x]².
"""

from __future__ import annotations

import triton
import triton.language as tl

from .statistics import at_least_one, merged, move_by_batch, positive, set_moments, united
from .tiles import NUMBERS, is_any, merge_of, task_of, tile_of, total, values_of

# Squares of 1e20 and more overflow float32. A power of two costs no digit; this one makes thousands of
# squares of the largest float32 fit into one.
_DOWN, _UP = tl.constexpr(2.0**-70), tl.constexpr(2.0**70)
_SMALL = tl.constexpr(2.0**-30)  # m2 of scaled values: below, no unscaled square overflows


@triton.jit
def moments_of_tile(values, valid, ROWS: tl.constexpr, REAL: tl.constexpr):
    """Returns count, mean and m2, float64, of a tile that holds all values of its channels, in two passes."""
    n = total(valid.to(REAL), ROWS)
    center = total(values * (1.0 / at_least_one(n)), ROWS)
    away = tl.where(valid, values - center, 0.0)
    rest, squares = total(away, ROWS).to(tl.float64), total(away * away, ROWS).to(tl.float64)
    is_finite = squares < float("inf")
    if is_any(squares >= float("inf"), ROWS):
        away = away * _DOWN
        rest = tl.where(is_finite, rest, total(away, ROWS).to(tl.float64) * _UP)
        squares = tl.where(is_finite, squares, total(away * away, ROWS).to(tl.float64) * _UP * _UP)
    count = n.to(tl.float64)
    off = rest / at_least_one(count)
    return count, center.to(tl.float64) + off, positive(squares - off * rest)


@triton.jit
def moments_by_lane(
    x,
    first,
    tiles,
    program,
    FACTOR: tl.constexpr,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Returns count, mean and m2, float64, of x * FACTOR, over `tiles` tiles from `first` on.

    A lane, that is a place in the tiles, takes deviations from a pivot: the first of its own values, then
    their mean whenever they have doubled in number. So the pivot is the mean of half of the lane's values at
    least; if it is far from the others, m2 is at least the square of that distance, and no smaller than the
    rounding. Lanes are merged around their common mean.
    """
    n = tl.zeros([OUTER, INNER], REAL)
    if EVEN:
        n = tl.zeros([1, 1], REAL)
    pivot = tl.zeros([OUTER, INNER], REAL)
    sums = tl.zeros([OUTER, INNER], REAL)
    squares = tl.zeros([OUTER, INNER], REAL)
    for tile in tl.range(0, tiles, num_stages=3):
        offsets, _, valid = tile_of(first + tile, program, ROWS, OUTER, INNER, EVEN)
        values = values_of(x, offsets, valid, REAL)
        if FACTOR is not None:
            values = values * FACTOR
        pivot = tl.where(valid & (n == 0.0), values, pivot)
        away = tl.where(valid, values - pivot, 0.0)
        if EVEN:
            n += 1.0
        else:
            n += tl.where(valid, 1.0, 0.0)
        sums += away
        squares = tl.fma(away, away, squares)
        if (tile & (tile - 1)) == 0:  # after 2, 3, 5, 9, ... values
            step = (pivot + sums / at_least_one(n)) - pivot
            rest = sums - n * step
            squares -= step * (sums + rest)
            sums = rest
            pivot += step
    off = sums / at_least_one(n)
    n = tl.broadcast_to(n, [OUTER, INNER])
    whole = total(n, ROWS)
    center = total((pivot + off) * (n / at_least_one(whole)), ROWS)
    apart = tl.where(n > 0.0, (pivot - center) + off, 0.0)
    rest = total(n * apart, ROWS).to(tl.float64)
    square = total((squares - sums * off) + n * apart * apart, ROWS).to(tl.float64)
    count = whole.to(tl.float64)
    left = rest / at_least_one(count)
    return count, center.to(tl.float64) + left, positive(square - left * rest)


@triton.jit
def _is_small(m2):
    """Returns whether m2 of x * _DOWN shows that the squares of x do not overflow; false for NaN."""
    return m2 < _SMALL


@triton.jit
def moments_of_tiles(
    x,
    tiles,
    program,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Returns count, mean and m2, float64, of all tiles of a group."""
    first = tl.full([], 0, tl.int64)
    count, mean, m2 = moments_by_lane(x, first, tiles, program, None, REAL, ROWS, OUTER, INNER, EVEN)
    if is_any((m2 < float("inf")) == 0, ROWS):  # float32 has overflowed; or x is not finite, and stays so
        _, mean_down, m2_down = moments_by_lane(
            x, first, tiles, program, _DOWN, REAL, ROWS, OUTER, INNER, EVEN
        )
        mean = tl.where(_is_small(m2_down), mean, mean_down * _UP)
        m2 = tl.where(_is_small(m2_down), m2, m2_down * _UP * _UP)
    return count, mean, m2


@triton.jit(do_not_specialize=NUMBERS)
def measure_parts(
    x,
    mask,
    part_count,
    part_mean,
    part_m2,
    channels,
    positions,
    units,
    group_units,
    groups,
    parts,
    tiles,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Writes count, mean and m2 of this program's part, to tables `[parts, G, C]`."""
    part, group, channel = task_of(channels, parts, ROWS, INNER)
    program = (group, channel, mask, (channels, positions, units, group_units))
    count, mean, m2 = moments_by_lane(x, part * tiles, tiles, program, None, REAL, ROWS, OUTER, INNER, EVEN)
    is_channel = channel < channels
    place = (part * groups + group) * channels + channel
    tl.store(part_count + place, count, mask=is_channel)
    tl.store(part_mean + place, mean, mask=is_channel)
    tl.store(part_m2 + place, m2, mask=is_channel)
    if is_any((m2 < float("inf")) == 0, ROWS):  # as above; overwritten, to hold no register meanwhile
        _, mean, m2 = moments_by_lane(x, part * tiles, tiles, program, _DOWN, REAL, ROWS, OUTER, INNER, EVEN)
        is_large = is_channel & (_is_small(m2) == 0)
        tl.store(part_mean + place, mean * _UP, mask=is_large)
        tl.store(part_m2 + place, m2 * _UP * _UP, mask=is_large)


@triton.jit(do_not_specialize=NUMBERS)
def merge_moments(
    part_count,
    part_mean,
    part_m2,
    count,
    mean,
    m2,
    rstd,
    running_mean,
    running_var,
    batches,
    momentum: tl.float64,
    channels,
    groups,
    parts,
    EPS: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Merges parts' moments of some channels of a group; writes these and rstd; moves running statistics."""
    group, channel = merge_of(channels, CHANNELS)
    is_channel = channel < channels
    found_count = tl.zeros([1, CHANNELS], tl.float64)
    found_mean = tl.zeros([1, CHANNELS], tl.float64)
    found_m2 = tl.zeros([1, CHANNELS], tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        inside = (part < parts) & is_channel
        place = (part.to(tl.int64) * groups + group) * channels + channel
        more, other_mean, other_m2 = united(
            tl.load(part_count + place, mask=inside, other=0.0),
            tl.load(part_mean + place, mask=inside, other=0.0),
            tl.load(part_m2 + place, mask=inside, other=0.0),
        )
        found_count, found_mean, found_m2 = merged(
            found_count, found_mean, found_m2, more, other_mean, other_m2
        )
    found = (found_count, found_mean, found_m2)
    set_moments(count, mean, m2, rstd, found, group, channels, channel, EPS)
    move_by_batch(running_mean, running_var, batches, channel, is_channel, momentum, found)
