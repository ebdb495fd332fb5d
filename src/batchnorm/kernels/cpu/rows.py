"""Kernels for values of all channels that lie side by side: channels-last, `[N, C]`; and for short planes.

x is read as rows of `columns` values, each of one unit or several. A unit has `positions` values per channel:

    channels-last, [N, C]     a unit is `[C]`; where channels are few, many units make a row
    short planes, [N, C, S]   a unit is a sample, `[C, S]`: a channel's few values side by side vectorize
                              badly, and all channels' together well

A task takes a block of columns, of whole channels, of one group of units; or a part of these units where they
are many. Sums are kept per column while rows go by, and go to the channels at the end of a block of rows.
"""

from __future__ import annotations

import math
from typing import Any

from . import row_tiles
from .access import load, size_of, store
from .channels import set_affine, set_all_coefficients, set_rstds, set_slopes
from .columns import (
    columns_in,
    gather,
    is_in,
    layout,
    place_of,
    spread,
    task_of,
    units_in_a_row,
    units_of,
    valid_values,
)
from .elementwise import (
    CENTER,
    RSTD,
    SCALE,
    SHIFT,
    A,
    B,
    C,
    clear_run,
    differentiate_run,
    incoming,
    normalize_run,
    some,
)
from .glance import glance
from .kernel_args import clear, numbers
from .llvm import LANES
from .statistics import FACTORS, is_far, merged, rounded
from .vector import function, is_simple, multiply_add, part_of_one, splat
from .workspace import CENTERS, FOUND, GIVEN, MIDDLES, MORE, REST, SUMS, tables

_ROWS = 64  # rows that are summed in float32; sums of blocks are added in float64


@part_of_one
def _around(
    args: Any,
    unit: Any,
    last: Any,
    column: Any,
    end: Any,
    factor: Any,
    by_column: Any,
    by_channel: Any,
    kind: Any,
    real: Any,
    how: Any,
) -> None:
    """Set MORE, of two rows, to the sums of x * factor - middle, and of its square."""
    width, fold, number = end - column, units_in_a_row(args), size_of(real)
    center, sums = by_column[CENTERS], by_column[SUMS:GIVEN]
    spread(by_channel[MIDDLES], args, column, width, center, real)
    clear(sums)
    while (is_simple(how) or not args.mask) and last - unit >= row_tiles.SUMMED * fold:
        place = place_of(args, unit, column)
        ahead = row_tiles.distance(args, unit, last, fold, row_tiles.SUMMED, kind)
        row_tiles.add_deviations(args, place, width, ahead, center, factor, sums, kind, real)
        unit += row_tiles.SUMMED * fold
    first, second = sums.ctypes.data, sums.ctypes.data + sums.shape[1] * number
    for row in range(unit, last, fold):
        if is_in(args, row, how):
            size = columns_in(args, row, last, column, end)
            for start in range(0, size, LANES):
                offset = start * number
                middle = load(center.ctypes.data + offset, real)
                address = args.x + place_of(args, row, column + start) * size_of(kind)
                values = some(address, size - start, middle * splat(1 / factor, real), kind)
                deviation = values * splat(factor, real) - middle
                store(load(first + offset, real) + deviation, first + offset, real)
                squares = multiply_add(deviation, deviation, load(second + offset, real))
                store(squares, second + offset, real)
    for row in range(2):
        gather(sums[row], args, column, width, by_channel[MORE + row], real)


@function
def _is_finite(m2: Any) -> Any:
    """Whether no m2 is infinite or NaN."""
    finite = True
    for channel in range(m2.size):
        finite &= math.isfinite(m2[channel])
    return finite


@function
def _is_any_far(deviations: Any, squares: Any, values: Any) -> Any:
    """Whether a channel's center was far from its mean."""
    far = False
    for channel in range(squares.size):
        far |= is_far(deviations[channel], squares[channel], values)
    return far


@part_of_one
def _moments(
    args: Any,
    unit: Any,
    last: Any,
    column: Any,
    end: Any,
    factor: Any,
    by_column: Any,
    by_channel: Any,
    kind: Any,
    real: Any,
    how: Any,
) -> Any:
    """Set FOUND, of two rows, to mean and m2 of x * factor, and return the count.

    Deviations are taken from the mean so far, as in planes.py.
    """
    fold, middles = units_in_a_row(args), by_channel[MIDDLES]
    mean, m2, sums, squares = by_channel[FOUND], by_channel[FOUND + 1], by_channel[MORE], by_channel[MORE + 1]
    count = 0.0
    clear(by_channel[FOUND:MORE])
    while unit < last:
        stop = min(last, unit + _ROWS * fold)
        values = valid_values(args, unit, stop, how)
        is_guess = count < values
        if is_guess:
            glance(args, unit, stop, column, end, factor, by_column, by_channel, kind, real, how)
        else:
            for channel in range(middles.size):
                middles[channel] = rounded(mean[channel], real)
        tries = 2 if is_guess else 1
        while tries:
            tries -= 1
            _around(args, unit, stop, column, end, factor, by_column, by_channel, kind, real, how)
            if tries and _is_any_far(sums, squares, values):
                for channel in range(middles.size):
                    middles[channel] = rounded(middles[channel] + sums[channel] / values, real)
            else:
                tries = 0
        if values:
            share = 1 / values
            for channel in range(middles.size):
                off = sums[channel] * share
                other = squares[channel] - off * sums[channel]
                mean[channel], m2[channel] = merged(
                    count, mean[channel], m2[channel], values, middles[channel] + off, other
                )
            count += values
        unit = stop
    return count


@part_of_one
def _measure(
    args: Any,
    part: Any,
    group: Any,
    unit: Any,
    last: Any,
    column: Any,
    end: Any,
    by_column: Any,
    by_channel: Any,
    kind: Any,
    real: Any,
    how: Any,
) -> None:
    """Take the moments of a block of columns, of a part of a group."""
    first_channel, channels, _, _, _ = layout(args, column, end - column)
    piece = part * args.groups + group
    start = 8 * (piece * args.channels + first_channel)
    means, m2s = numbers(args.part_mean + start, channels), numbers(args.part_m2 + start, channels)
    mean, m2 = by_channel[FOUND], by_channel[FOUND + 1]
    count, is_first = 0.0, True
    for factor in FACTORS:
        whole = 1 / factor  # exact
        if is_first or not _is_finite(m2):
            count = _moments(args, unit, last, column, end, factor, by_column, by_channel, kind, real, how)
            for channel in range(channels):
                # Where float32 has overflowed; or x is not finite, and stays so. Other channels are not
                # touched: what is small would vanish under the second factor.
                if is_first or not math.isfinite(m2s[channel]):
                    means[channel] = mean[channel] * whole
                    m2s[channel] = m2[channel] * whole * whole
        is_first = False
    if column == 0:
        numbers(args.part_count, args.parts * args.groups)[piece] = count
    if args.parts == 1:
        set_rstds(args, group, first_channel, channels, count)


@function
def forward(
    args: Any, index: Any, measures: Any, applies: Any, workspace: Any, kind: Any, real: Any, how: Any
) -> None:
    """Take a task's moments, write its y, or both; statistics of all parts are merged in between."""
    part, first_group, last_group, column, end = task_of(args, index)
    width, fold = end - column, units_in_a_row(args)
    by_column, by_channel = tables(args, workspace, column, end, real)
    given = by_column[GIVEN:]
    for group in range(first_group, last_group):
        unit, last = units_of(args, part, group)
        if measures:
            _measure(args, part, group, unit, last, column, end, by_column, by_channel, kind, real, how)
        if applies:
            _set_affine(args, group, column, width, given, by_channel, real)
        while applies and is_simple(how) and width >= LANES and last - unit >= row_tiles.WRITTEN * fold:
            ahead = (
                row_tiles.distance(args, unit, last, fold, row_tiles.WRITTEN, kind) if args.parts > 1 else 0
            )
            place = place_of(args, unit, column)
            row_tiles.normalize(args, place, width, ahead, given, kind, real)
            unit += row_tiles.WRITTEN * fold
        for row in range(unit, last if applies else unit, fold):
            size = columns_in(args, row, last, column, end)
            place = place_of(args, row, column)
            if is_in(args, row, how):
                normalize_run(args, place, size, 0, given, 1, kind, real, how)
            else:
                clear_run(args.y, place, size, kind, real)


@function
def _set_affine(
    args: Any, group: Any, column: Any, width: Any, given: Any, by_channel: Any, real: Any
) -> None:
    """Set center, scale and shift of each column; and REST to what rounding left of each channel's mean."""
    first_channel, _, _, _, _ = layout(args, column, width)
    set_affine(
        args,
        group,
        first_channel,
        by_channel[CENTER],
        by_channel[SCALE],
        by_channel[SHIFT],
        by_channel[REST],
        real,
    )
    for row in (CENTER, SCALE, SHIFT):
        spread(by_channel[row], args, column, width, given[row], real)


@part_of_one
def _set_slopes(
    args: Any, group: Any, column: Any, width: Any, given: Any, by_channel: Any, real: Any
) -> None:
    """Set a, b and c of each column."""
    first_channel, _, _, _, _ = layout(args, column, width)
    set_slopes(args, group, first_channel, by_channel[REST], by_channel[A], by_channel[B], by_channel[C])
    for row in (A, B, C):
        spread(by_channel[row], args, column, width, given[row], real)


@part_of_one
def _add_gradients(
    args: Any,
    unit: Any,
    last: Any,
    column: Any,
    end: Any,
    given: Any,
    sums: Any,
    kind: Any,
    real: Any,
    how: Any,
) -> None:
    """Set the two rows of sums, per column, to Σ dy' and Σ dy' (x - center) rstd."""
    clear(sums)
    parameters, first = given.ctypes.data, sums.ctypes.data
    second = first + sums.shape[1] * size_of(real)
    row_bytes = given.shape[1] * size_of(real)
    fold = units_in_a_row(args)
    low, high = splat(args.low_kink, real), splat(args.high_kink, real)
    while is_simple(how) and last - unit >= row_tiles.SUMMED * fold:
        place = place_of(args, unit, column)
        ahead = row_tiles.distance(args, unit, last, fold, row_tiles.SUMMED, kind)
        row_tiles.add_gradients(args, place, end - column, ahead, given, sums, kind, real)
        unit += row_tiles.SUMMED * fold
    for row in range(unit, last, fold):
        if is_in(args, row, how):
            size = columns_in(args, row, last, column, end)
            for start in range(0, size, LANES):
                offset, count = start * size_of(real), size - start
                center = load(parameters + offset + CENTER * row_bytes, real)
                scale = load(parameters + offset + SCALE * row_bytes, real)
                shift = load(parameters + offset + SHIFT * row_bytes, real)
                rstd = load(parameters + offset + RSTD * row_bytes, real)
                place = place_of(args, row, column + start)
                centred = some(args.x + place * size_of(kind), count, center, kind) - center
                dy = incoming(args, place, count, centred, scale, shift, low, high, kind, real, how)
                store(load(first + offset, real) + dy, first + offset, real)
                products = multiply_add(dy, centred * rstd, load(second + offset, real))
                store(products, second + offset, real)


@part_of_one
def _sum_gradients(
    args: Any,
    part: Any,
    group: Any,
    unit: Any,
    last: Any,
    column: Any,
    end: Any,
    by_column: Any,
    by_channel: Any,
    kind: Any,
    real: Any,
    how: Any,
) -> None:
    """Take the sums of the gradient of a block of columns, of a part of a group."""
    width, fold = end - column, units_in_a_row(args)
    first_channel, channels, _, _, _ = layout(args, column, width)
    given, sums, rest = by_column[GIVEN:], by_column[SUMS:GIVEN], by_channel[REST]
    dy, xhat = by_channel[MORE], by_channel[MORE + 1]
    piece = part * args.groups + group
    start = 8 * (piece * args.channels + first_channel)
    sum_dy, sum_xhat = (
        numbers(args.part_dy + start, channels),
        numbers(args.part_dy_xhat + start, channels),
    )
    rstd = numbers(args.rstd + 8 * (group * args.channels + first_channel), channels)
    for channel in range(channels):
        sum_dy[channel], sum_xhat[channel] = 0.0, 0.0
    for begin in range(unit, last, _ROWS * fold):
        stop = min(last, begin + _ROWS * fold)
        _add_gradients(args, begin, stop, column, end, given, sums, kind, real, how)
        for row in range(2):
            gather(sums[row], args, column, width, by_channel[MORE + row], real)
        for channel in range(channels):
            sum_dy[channel] += dy[channel]
            sum_xhat[channel] += xhat[channel]
    for channel in range(channels):
        sum_xhat[channel] -= rest[channel] * rstd[channel] * sum_dy[channel]
    count = valid_values(args, unit, last, how)
    if column == 0:
        numbers(args.part_count, args.parts * args.groups)[piece] = count
    if args.parts == 1:
        set_all_coefficients(args, group, first_channel, channels, count, real)


@function
def backward(
    args: Any, index: Any, measures: Any, applies: Any, workspace: Any, kind: Any, real: Any, how: Any
) -> None:
    """Take the sums of a task's gradient, write its dx, or both; sums of all parts are added in between."""
    part, first_group, last_group, column, end = task_of(args, index)
    width, fold = end - column, units_in_a_row(args)
    by_column, by_channel = tables(args, workspace, column, end, real)
    given = by_column[GIVEN:]
    first_channel, channels, _, _, _ = layout(args, column, width)
    for group in range(first_group, last_group):
        unit, last = units_of(args, part, group)
        _set_affine(args, group, column, width, given, by_channel, real)
        rstd = numbers(args.rstd + 8 * (group * args.channels + first_channel), channels)
        spread(rstd, args, column, width, given[RSTD], real)
        if measures:
            _sum_gradients(args, part, group, unit, last, column, end, by_column, by_channel, kind, real, how)
        if applies:
            _set_slopes(args, group, column, width, given, by_channel, real)
        while applies and is_simple(how) and width >= LANES and last - unit >= row_tiles.WRITTEN * fold:
            ahead = (
                row_tiles.distance(args, unit, last, fold, row_tiles.WRITTEN, kind) if args.parts > 1 else 0
            )
            place = place_of(args, unit, column)
            row_tiles.differentiate(args, place, width, ahead, given, kind, real)
            unit += row_tiles.WRITTEN * fold
        for row in range(unit, last if applies else unit, fold):
            size = columns_in(args, row, last, column, end)
            place = place_of(args, row, column)
            if is_in(args, row, how):
                differentiate_run(args, place, size, 0, given, 1, kind, real, how)
            else:
                clear_run(args.dx, place, size, kind, real)
                if args.dresidual:
                    clear_run(args.dresidual, place, size, kind, real)
