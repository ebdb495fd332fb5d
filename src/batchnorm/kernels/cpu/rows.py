"""Computes the forward and the backward of values that lie side by side across channels.

x is read as rows of `columns` values, each of one unit or several. A unit has `positions` values per channel:

    channels-last, [N, C]     a unit is `[C]`; where channels are few, many units make a row
    short planes, [N, C, S]   a unit is a sample, `[C, S]`: a channel's few values side by side vectorize
                              badly, and all channels' together well

A task takes a block of columns, of whole channels, of one group of units or several; or of a part of a group
that has many units. A block of rows is summed per column; then these sums are added up per channel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import row_tiles
from .access import load, size_of, store
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
from .kernel_args import clear, numbers
from .llvm import LANES
from .row_layout import (
    CENTERS,
    CHANNEL_CENTERS,
    CHANNEL_SUMS,
    GIVEN,
    MOMENTS,
    REST,
    SUMS,
    columns_in,
    gather,
    is_in,
    place_of,
    spread,
    tables,
    task_of,
    units_in_a_row,
    units_of,
    valid_values,
)
from .statistics import (
    FACTORS,
    is_far,
    merged,
    rounded,
    set_affine,
    set_coefficients,
    set_rstd,
    set_slopes,
)
from .vector import function, is_simple, multiply_add, part_of_one, splat, total

_ROWS = 64  # rows that are summed in float32; sums of blocks are added in float64


@function
def _add_row(args: Any, place: Any, size: Any, factor: Any, sums: Any, variant: Any) -> None:
    """Adds x * factor of `size` columns of a row to sums at an address, with LANES numbers to spare."""
    dtype, real = variant.dtype, variant.real
    zero, scale = splat(0.0, real), splat(factor, real)
    for start in range(0, size, LANES):
        address, here = args.x + (place + start) * size_of(dtype), sums + start * size_of(real)
        store(load(here, real) + some(address, size - start, zero, dtype) * scale, here, real)


@part_of_one
def _guess_means(
    args: Any, columns: Any, unit: Any, end: Any, factor: Any, by_column: Any, by_channel: Any, variant: Any
) -> None:
    """Sets CHANNEL_CENTERS to means of a few values x * factor of each channel, of units from `unit` on.

    The values are those of a few rows; of short planes, a vector's worth, as they are not summed per column
    here.
    """
    sums, centers, size = by_column[SUMS], by_channel[CHANNEL_CENTERS], args.positions
    dtype, real = variant.dtype, variant.real
    if size > 1:  # without a mask: planes.py takes calls that have one, as partition.py decides
        beside, zero, scale = min(size, LANES), splat(0.0, real), splat(factor, real)
        stop = min(end, unit + (LANES + size - 1) // size)
        for channel in range(centers.size):
            found = zero
            for row in range(unit, stop):
                place = place_of(args, row, columns.first + channel * size)
                found = found + some(args.x + place * size_of(dtype), beside, zero, dtype) * scale
            centers[channel] = total(found)
        share = 1 / np.float64((stop - unit) * beside)
    else:
        fold = units_in_a_row(args)
        stop = min(end, unit + row_tiles.SUMMED * fold)
        for place in range(sums.size):
            sums[place] = 0
        for row in range(unit, stop, fold):
            if is_in(args, row, variant):
                width = columns_in(args, row, end, columns)
                _add_row(args, place_of(args, row, columns.first), width, factor, sums.ctypes.data, variant)
        gather(sums, columns, centers, real)
        share = 1 / max(valid_values(args, unit, stop, variant), 1.0)
    for channel in range(centers.size):
        centers[channel] = rounded(centers[channel] * share, real)


@part_of_one
def _sum_deviations(
    args: Any, columns: Any, unit: Any, end: Any, factor: Any, by_column: Any, by_channel: Any, variant: Any
) -> None:
    """Sets both rows CHANNEL_SUMS to sums of x * factor - center, and its square, of units up to `end`."""
    dtype, real = variant.dtype, variant.real
    fold, number = units_in_a_row(args), size_of(real)
    centers, sums = by_column[CENTERS], by_column[SUMS:GIVEN]
    spread(by_channel[CHANNEL_CENTERS], columns, centers, real)
    clear(sums)
    while (is_simple(variant) or not args.mask) and end - unit >= row_tiles.SUMMED * fold:
        place = place_of(args, unit, columns.first)
        ahead = row_tiles.distance(args, unit, end, fold, row_tiles.SUMMED, dtype)
        row_tiles.add_deviations(args, place, columns.width, ahead, centers, factor, sums, variant)
        unit += row_tiles.SUMMED * fold
    first, second = sums.ctypes.data, sums.ctypes.data + sums.shape[1] * number
    for row in range(unit, end, fold):
        if is_in(args, row, variant):
            size = columns_in(args, row, end, columns)
            for start in range(0, size, LANES):
                offset = start * number
                center = load(centers.ctypes.data + offset, real)
                address = args.x + place_of(args, row, columns.first + start) * size_of(dtype)
                values = some(address, size - start, center * splat(1 / factor, real), dtype)
                deviation = values * splat(factor, real) - center
                store(load(first + offset, real) + deviation, first + offset, real)
                squares = multiply_add(deviation, deviation, load(second + offset, real))
                store(squares, second + offset, real)
    for row in range(2):
        gather(sums[row], columns, by_channel[CHANNEL_SUMS + row], real)


@function
def _is_finite(m2: Any) -> Any:
    """Returns whether no m2 is infinite or NaN."""
    finite = True
    for channel in range(m2.size):
        finite &= math.isfinite(m2[channel])
    return finite


@function
def _is_any_far(deviations: Any, squares: Any, values: Any) -> Any:
    """Returns whether any channel's center is far from its mean."""
    far = False
    for channel in range(squares.size):
        far |= is_far(deviations[channel], squares[channel], values)
    return far


@part_of_one
def _moments(
    args: Any, columns: Any, unit: Any, end: Any, factor: Any, by_column: Any, by_channel: Any, variant: Any
) -> Any:
    """Sets the two rows MOMENTS to mean and m2 of x * factor, of units up to `end`, and returns the count.

    Deviations are taken from the mean so far, as in planes.py.
    """
    fold, centers, real = units_in_a_row(args), by_channel[CHANNEL_CENTERS], variant.real
    mean, m2 = by_channel[MOMENTS], by_channel[MOMENTS + 1]
    sums, squares = by_channel[CHANNEL_SUMS], by_channel[CHANNEL_SUMS + 1]
    count = 0.0
    clear(by_channel[MOMENTS:CHANNEL_SUMS])
    while unit < end:
        stop = min(end, unit + _ROWS * fold)
        values = valid_values(args, unit, stop, variant)
        is_guess = count < values
        if is_guess:
            _guess_means(args, columns, unit, stop, factor, by_column, by_channel, variant)
        else:
            for channel in range(centers.size):
                centers[channel] = rounded(mean[channel], real)
        tries = 2 if is_guess else 1
        while tries:
            tries -= 1
            _sum_deviations(args, columns, unit, stop, factor, by_column, by_channel, variant)
            if tries and _is_any_far(sums, squares, values):
                for channel in range(centers.size):
                    centers[channel] = rounded(centers[channel] + sums[channel] / values, real)
            else:
                tries = 0
        if values:
            share = 1 / values
            for channel in range(centers.size):
                off = sums[channel] * share
                other = squares[channel] - off * sums[channel]
                mean[channel], m2[channel] = merged(
                    count, mean[channel], m2[channel], values, centers[channel] + off, other
                )
            count += values
        unit = stop
    return count


@part_of_one
def _measure(
    args: Any, columns: Any, part: Any, group: Any, by_column: Any, by_channel: Any, variant: Any
) -> None:
    """Writes the moments of a block of columns, of a part of a group."""
    channels = columns.channels
    unit, end = units_of(args, part, group)
    piece = part * args.groups + group
    start = 8 * (piece * args.channels + columns.channel)
    means, m2s = numbers(args.part_mean + start, channels), numbers(args.part_m2 + start, channels)
    mean, m2 = by_channel[MOMENTS], by_channel[MOMENTS + 1]
    count, is_first = 0.0, True
    for factor in FACTORS:
        whole = 1 / factor  # exact
        if is_first or not _is_finite(m2):
            count = _moments(args, columns, unit, end, factor, by_column, by_channel, variant)
            for channel in range(channels):
                # With the second factor, only channels whose squares overflowed float32, or whose x is not
                # finite, and stays so: small values of the others would vanish under that factor.
                if is_first or not math.isfinite(m2s[channel]):
                    means[channel] = mean[channel] * whole
                    m2s[channel] = m2[channel] * whole * whole
        is_first = False
    if columns.first == 0:
        numbers(args.part_count, args.parts * args.groups)[piece] = count
    if args.parts == 1:
        set_rstd(args, group, columns.channel, channels, count)


@function
def forward(args: Any, index: Any, measures: Any, applies: Any, workspace: Any, variant: Any) -> None:
    """Writes a task's moments, its y, or both; statistics of all parts are merged in between."""
    dtype, real = variant.dtype, variant.real
    part, first_group, last_group, columns = task_of(args, index)
    width, fold = columns.width, units_in_a_row(args)
    by_column, by_channel = tables(workspace, columns, real)
    given = by_column[GIVEN:]
    for group in range(first_group, last_group):
        unit, end = units_of(args, part, group)
        if measures:
            _measure(args, columns, part, group, by_column, by_channel, variant)
        if applies:
            _set_affine(args, columns, group, given, by_channel, real)
        while applies and is_simple(variant) and width >= LANES and end - unit >= row_tiles.WRITTEN * fold:
            ahead = 0
            if args.parts > 1:
                ahead = row_tiles.distance(args, unit, end, fold, row_tiles.WRITTEN, dtype)
            row_tiles.normalize(args, place_of(args, unit, columns.first), width, ahead, given, variant)
            unit += row_tiles.WRITTEN * fold
        for row in range(unit, end if applies else unit, fold):
            size = columns_in(args, row, end, columns)
            place = place_of(args, row, columns.first)
            if is_in(args, row, variant):
                normalize_run(args, place, size, 0, given, 1, variant)
            else:
                clear_run(args.y, place, size, dtype)


@function
def _set_affine(args: Any, columns: Any, group: Any, given: Any, by_channel: Any, real: Any) -> None:
    """Sets center, scale and shift of each column; and REST to what rounding left of each channel's mean."""
    set_affine(
        args,
        group,
        columns.channel,
        by_channel[CENTER],
        by_channel[SCALE],
        by_channel[SHIFT],
        by_channel[REST],
        real,
    )
    for row in (CENTER, SCALE, SHIFT):
        spread(by_channel[row], columns, given[row], real)


@part_of_one
def _set_slopes(args: Any, columns: Any, group: Any, given: Any, by_channel: Any, real: Any) -> None:
    """Sets a, b and c of each column."""
    rest = by_channel[REST]
    set_slopes(args, group, columns.channel, rest, by_channel[A], by_channel[B], by_channel[C])
    for row in (A, B, C):
        spread(by_channel[row], columns, given[row], real)


@part_of_one
def _sum_rows(args: Any, columns: Any, unit: Any, end: Any, given: Any, sums: Any, variant: Any) -> None:
    """Sets the two rows of sums, per column, to Σ dy' and Σ dy' (x - center) rstd of units up to `end`."""
    clear(sums)
    dtype, real = variant.dtype, variant.real
    parameters, first = given.ctypes.data, sums.ctypes.data
    second = first + sums.shape[1] * size_of(real)
    row_bytes = given.shape[1] * size_of(real)
    fold = units_in_a_row(args)
    low, high = splat(args.low_kink, real), splat(args.high_kink, real)
    while is_simple(variant) and end - unit >= row_tiles.SUMMED * fold:
        place = place_of(args, unit, columns.first)
        ahead = row_tiles.distance(args, unit, end, fold, row_tiles.SUMMED, dtype)
        row_tiles.add_gradients(args, place, columns.width, ahead, given, sums, variant)
        unit += row_tiles.SUMMED * fold
    for row in range(unit, end, fold):
        if is_in(args, row, variant):
            size = columns_in(args, row, end, columns)
            for start in range(0, size, LANES):
                offset, count = start * size_of(real), size - start
                center = load(parameters + offset + CENTER * row_bytes, real)
                scale = load(parameters + offset + SCALE * row_bytes, real)
                shift = load(parameters + offset + SHIFT * row_bytes, real)
                rstd = load(parameters + offset + RSTD * row_bytes, real)
                place = place_of(args, row, columns.first + start)
                centred = some(args.x + place * size_of(dtype), count, center, dtype) - center
                dy = incoming(args, place, count, centred, scale, shift, low, high, variant)
                store(load(first + offset, real) + dy, first + offset, real)
                products = multiply_add(dy, centred * rstd, load(second + offset, real))
                store(products, second + offset, real)


@part_of_one
def _sum_gradients(
    args: Any, columns: Any, part: Any, group: Any, by_column: Any, by_channel: Any, variant: Any
) -> None:
    """Writes the gradient's sums of a block of columns, of a part of a group."""
    fold, channels, real = units_in_a_row(args), columns.channels, variant.real
    given, sums, rest = by_column[GIVEN:], by_column[SUMS:GIVEN], by_channel[REST]
    dy, xhat = by_channel[CHANNEL_SUMS], by_channel[CHANNEL_SUMS + 1]
    unit, end = units_of(args, part, group)
    piece = part * args.groups + group
    start = 8 * (piece * args.channels + columns.channel)
    sum_dy, sum_xhat = numbers(args.part_dy + start, channels), numbers(args.part_dy_xhat + start, channels)
    rstd = numbers(args.rstd + 8 * (group * args.channels + columns.channel), channels)
    for channel in range(channels):
        sum_dy[channel], sum_xhat[channel] = 0.0, 0.0
    for begin in range(unit, end, _ROWS * fold):
        stop = min(end, begin + _ROWS * fold)
        _sum_rows(args, columns, begin, stop, given, sums, variant)
        for row in range(2):
            gather(sums[row], columns, by_channel[CHANNEL_SUMS + row], real)
        for channel in range(channels):
            sum_dy[channel] += dy[channel]
            sum_xhat[channel] += xhat[channel]
    for channel in range(channels):
        sum_xhat[channel] -= rest[channel] * rstd[channel] * sum_dy[channel]
    count = valid_values(args, unit, end, variant)
    if columns.first == 0:
        numbers(args.part_count, args.parts * args.groups)[piece] = count
    if args.parts == 1:
        set_coefficients(args, group, columns.channel, channels, count, real)


@function
def backward(args: Any, index: Any, measures: Any, applies: Any, workspace: Any, variant: Any) -> None:
    """Writes the sums of a task's gradient, its dx, or both; sums of all parts are added in between."""
    dtype, real = variant.dtype, variant.real
    part, first_group, last_group, columns = task_of(args, index)
    width, fold = columns.width, units_in_a_row(args)
    by_column, by_channel = tables(workspace, columns, real)
    given = by_column[GIVEN:]
    for group in range(first_group, last_group):
        unit, end = units_of(args, part, group)
        _set_affine(args, columns, group, given, by_channel, real)
        rstd = numbers(args.rstd + 8 * (group * args.channels + columns.channel), columns.channels)
        spread(rstd, columns, given[RSTD], real)
        if measures:
            _sum_gradients(args, columns, part, group, by_column, by_channel, variant)
        if applies:
            _set_slopes(args, columns, group, given, by_channel, real)
        while applies and is_simple(variant) and width >= LANES and end - unit >= row_tiles.WRITTEN * fold:
            ahead = 0
            if args.parts > 1:
                ahead = row_tiles.distance(args, unit, end, fold, row_tiles.WRITTEN, dtype)
            row_tiles.differentiate(args, place_of(args, unit, columns.first), width, ahead, given, variant)
            unit += row_tiles.WRITTEN * fold
        for row in range(unit, end if applies else unit, fold):
            size = columns_in(args, row, end, columns)
            place = place_of(args, row, columns.first)
            if is_in(args, row, variant):
                differentiate_run(args, place, size, 0, given, 1, variant)
            else:
                clear_run(args.dx, place, size, dtype)
                if args.dresidual:
                    clear_run(args.dresidual, place, size, dtype)
