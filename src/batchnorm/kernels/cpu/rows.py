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

import numpy as np

from . import strips
from .access import load, size_of, store
from .columns import (
    columns_in,
    gather,
    is_in,
    layout,
    place_of,
    spread,
    task_of,
    units_in_a_row,
    valid_values,
)
from .llvm import LANES
from .packet import clear, numbers
from .runs import (
    CENTER,
    PARAMETERS,
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
from .statistics import FACTORS, affine, is_far, merged, rounded, set_coefficients, set_rstd, slopes
from .vector import function, is_simple, multiply_add, splat

_ROWS = 64  # rows that are summed in float32; sums of blocks are added in float64


@function
def _around(
    packet: Any,
    unit: Any,
    last: Any,
    column: Any,
    end: Any,
    centers: Any,
    factor: Any,
    found: Any,
    kind: Any,
    real: Any,
    how: Any,
) -> None:
    """Set the two rows of `found`, per channel, to the sums of x * factor - center and of its square."""
    width, fold, number = end - column, units_in_a_row(packet), size_of(real)
    center, sums = np.zeros(width + LANES, real), np.zeros((2, width + LANES), real)
    spread(centers, packet, column, width, center, real)
    while (is_simple(how) or not packet.mask) and last - unit >= strips.SUMMED * fold:
        place = place_of(packet, unit, column)
        ahead = strips.distance(packet, unit, last, fold, strips.SUMMED, kind)
        strips.add_deviations(packet, place, width, ahead, center, factor, sums, kind, real)
        unit += strips.SUMMED * fold
    first, second = sums.ctypes.data, sums.ctypes.data + sums.shape[1] * number
    for row in range(unit, last, fold):
        if is_in(packet, row, how):
            size = columns_in(packet, row, last, column, end)
            for start in range(0, size, LANES):
                offset = start * number
                middle = load(center.ctypes.data + offset, real)
                address = packet.x + place_of(packet, row, column + start) * size_of(kind)
                values = some(address, size - start, middle * splat(1 / factor, real), kind)
                deviation = values * splat(factor, real) - middle
                store(load(first + offset, real) + deviation, first + offset, real)
                squares = multiply_add(deviation, deviation, load(second + offset, real))
                store(squares, second + offset, real)
    gather(sums[0], packet, column, width, found[0], real)
    gather(sums[1], packet, column, width, found[1], real)


@function
def _is_finite(found: Any) -> Any:
    """Whether no m2 is infinite or NaN."""
    finite = True
    for channel in range(found.shape[1]):
        finite = finite and math.isfinite(found[1, channel])
    return finite


@function
def _is_any_far(more: Any, values: Any) -> Any:
    """Whether a channel's center was far from its mean."""
    far = False
    for channel in range(more.shape[1]):
        far = far or is_far(more[0, channel], more[1, channel], values)
    return far


@function
def _moments(
    packet: Any,
    unit: Any,
    last: Any,
    column: Any,
    end: Any,
    factor: Any,
    found: Any,
    kind: Any,
    real: Any,
    how: Any,
) -> Any:
    """Set the two rows of `found`, per channel, to mean and m2 of x * factor, and return the count.

    Deviations are taken from the mean so far, as in planes.py.
    """
    channels, fold = found.shape[1], units_in_a_row(packet)
    more, centers = np.empty((2, channels), np.float64), np.empty(channels, np.float64)
    count = 0.0
    clear(found)
    while unit < last:
        stop = min(last, unit + _ROWS * fold)
        values = valid_values(packet, unit, stop, how)
        is_guess = count < values
        for channel in range(channels):
            centers[channel] = 0.0 if is_guess else rounded(found[0, channel], real)
        if is_guess:
            glance = min(stop, unit + strips.SUMMED * fold)
            seen = max(valid_values(packet, unit, glance, how), 1.0)
            _around(packet, unit, glance, column, end, centers, factor, more, kind, real, how)
            for channel in range(channels):
                centers[channel] = rounded(more[0, channel] / seen, real)
        _around(packet, unit, stop, column, end, centers, factor, more, kind, real, how)
        if is_guess and _is_any_far(more, values):
            for channel in range(channels):
                centers[channel] = rounded(centers[channel] + more[0, channel] / values, real)
            _around(packet, unit, stop, column, end, centers, factor, more, kind, real, how)
        if values:
            for channel in range(channels):
                off = more[0, channel] / values
                found[0, channel], found[1, channel] = merged(
                    count,
                    found[0, channel],
                    found[1, channel],
                    values,
                    centers[channel] + off,
                    more[1, channel] - off * more[0, channel],
                )
            count += values
        unit = stop
    return count


@function
def forward(packet: Any, index: Any, measures: Any, applies: Any, kind: Any, real: Any, how: Any) -> None:
    """Take a task's moments, write its y, or both; statistics of all parts are merged in between."""
    part, group, unit, last, column, end = task_of(packet, index)
    width = end - column
    first_channel, channels, _, _, _ = layout(packet, column, width)
    if measures:
        found, more = np.zeros((2, channels), np.float64), np.empty((2, channels), np.float64)
        count = -1.0
        for factor in FACTORS:
            if count < 0 or not _is_finite(found):
                first = count < 0
                count = _moments(packet, unit, last, column, end, factor, more, kind, real, how)
                for channel in range(channels):
                    # Where float32 has overflowed; or x is not finite, and stays so. Other channels are not
                    # touched: what is small would vanish under the second factor.
                    if first or not math.isfinite(found[1, channel]):
                        found[0, channel] = more[0, channel] / factor
                        found[1, channel] = more[1, channel] / factor / factor
        size = packet.parts * packet.groups * packet.channels
        place = (part * packet.groups + group) * packet.channels + first_channel
        numbers(packet.part_count, packet.parts * packet.groups)[part * packet.groups + group] = count
        means, m2s = numbers(packet.part_mean, size), numbers(packet.part_m2, size)
        for channel in range(channels):
            means[place + channel], m2s[place + channel] = found[0, channel], found[1, channel]
        if packet.parts == 1:
            set_rstd(packet, group, first_channel, first_channel + channels)
    if applies:
        given = np.empty((PARAMETERS, width + LANES), real)
        _set_affine(packet, group, column, width, given, real)
        fold = units_in_a_row(packet)
        while is_simple(how) and width >= LANES and last - unit >= strips.WRITTEN * fold:
            ahead = strips.distance(packet, unit, last, fold, strips.WRITTEN, kind) if packet.parts > 1 else 0
            place = place_of(packet, unit, column)
            strips.normalize(packet, place, width, ahead, given, kind, real)
            unit += strips.WRITTEN * fold
        for row in range(unit, last, fold):
            size = columns_in(packet, row, last, column, end)
            place = place_of(packet, row, column)
            if is_in(packet, row, how):
                normalize_run(packet, place, size, 0, given, 1, kind, real, how)
            else:
                clear_run(packet.y, place, size, kind, real)


@function
def _set_affine(packet: Any, group: Any, column: Any, width: Any, given: Any, real: Any) -> Any:
    """Set center, scale, shift and rstd of each column; return what rounding left of each channel's mean."""
    first_channel, channels, _, _, _ = layout(packet, column, width)
    values = np.empty((PARAMETERS, channels), np.float64)
    rest = np.empty(channels, np.float64)
    for channel in range(channels):
        values[CENTER, channel], values[SCALE, channel], values[SHIFT, channel], rest[channel] = affine(
            packet, group, first_channel + channel, real
        )
        values[RSTD, channel] = numbers(packet.rstd, packet.groups * packet.channels)[
            group * packet.channels + first_channel + channel
        ]
    for row in (CENTER, SCALE, SHIFT, RSTD):
        spread(values[row], packet, column, width, given[row], real)
    return rest


@function
def _set_slopes(packet: Any, group: Any, column: Any, width: Any, rest: Any, given: Any, real: Any) -> None:
    """Set a, b and c of each column."""
    first_channel, channels, _, _, _ = layout(packet, column, width)
    values = np.empty((PARAMETERS, channels), np.float64)
    for channel in range(channels):
        values[A, channel], values[B, channel], values[C, channel] = slopes(
            packet, group, first_channel + channel, rest[channel]
        )
    for row in (A, B, C):
        spread(values[row], packet, column, width, given[row], real)


@function
def _add_gradients(
    packet: Any,
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
    fold = units_in_a_row(packet)
    low, high = splat(packet.low_kink, real), splat(packet.high_kink, real)
    while is_simple(how) and last - unit >= strips.SUMMED * fold:
        place = place_of(packet, unit, column)
        ahead = strips.distance(packet, unit, last, fold, strips.SUMMED, kind)
        strips.add_gradients(packet, place, end - column, ahead, given, sums, kind, real)
        unit += strips.SUMMED * fold
    for row in range(unit, last, fold):
        if is_in(packet, row, how):
            size = columns_in(packet, row, last, column, end)
            for start in range(0, size, LANES):
                offset, count = start * size_of(real), size - start
                center = load(parameters + offset + CENTER * row_bytes, real)
                scale = load(parameters + offset + SCALE * row_bytes, real)
                shift = load(parameters + offset + SHIFT * row_bytes, real)
                rstd = load(parameters + offset + RSTD * row_bytes, real)
                place = place_of(packet, row, column + start)
                centred = some(packet.x + place * size_of(kind), count, center, kind) - center
                dy = incoming(packet, place, count, centred, scale, shift, low, high, kind, real, how)
                store(load(first + offset, real) + dy, first + offset, real)
                products = multiply_add(dy, centred * rstd, load(second + offset, real))
                store(products, second + offset, real)


@function
def backward(packet: Any, index: Any, measures: Any, applies: Any, kind: Any, real: Any, how: Any) -> None:
    """Take the sums of a task's gradient, write its dx, or both; sums of all parts are added in between."""
    part, group, unit, last, column, end = task_of(packet, index)
    width = end - column
    first_channel, channels, _, _, _ = layout(packet, column, width)
    given = np.zeros((PARAMETERS, width + LANES), real)
    rest = _set_affine(packet, group, column, width, given, real)
    fold = units_in_a_row(packet)
    if measures:
        sums = np.empty((2, width + LANES), real)
        more, found = np.empty((2, channels), np.float64), np.zeros((2, channels), np.float64)
        for start in range(unit, last, _ROWS * fold):
            stop = min(last, start + _ROWS * fold)
            _add_gradients(packet, start, stop, column, end, given, sums, kind, real, how)
            gather(sums[0], packet, column, width, more[0], real)
            gather(sums[1], packet, column, width, more[1], real)
            for channel in range(channels):
                found[0, channel] += more[0, channel]
                found[1, channel] += more[1, channel]
        size = packet.parts * packet.groups * packet.channels
        place = (part * packet.groups + group) * packet.channels + first_channel
        count = valid_values(packet, unit, last, how)
        rstds = numbers(packet.rstd, packet.groups * packet.channels)
        numbers(packet.part_count, packet.parts * packet.groups)[part * packet.groups + group] = count
        sums_dy, products = numbers(packet.part_dy, size), numbers(packet.part_dy_xhat, size)
        for channel in range(channels):
            rstd = rstds[group * packet.channels + first_channel + channel]
            sums_dy[place + channel] = found[0, channel]
            products[place + channel] = found[1, channel] - rest[channel] * rstd * found[0, channel]
        if packet.parts == 1:
            set_coefficients(packet, group, first_channel, first_channel + channels, count, real)
    if applies:
        _set_slopes(packet, group, column, width, rest, given, real)
        while is_simple(how) and width >= LANES and last - unit >= strips.WRITTEN * fold:
            ahead = strips.distance(packet, unit, last, fold, strips.WRITTEN, kind) if packet.parts > 1 else 0
            place = place_of(packet, unit, column)
            strips.differentiate(packet, place, width, ahead, given, kind, real)
            unit += strips.WRITTEN * fold
        for row in range(unit, last, fold):
            size = columns_in(packet, row, last, column, end)
            place = place_of(packet, row, column)
            if is_in(packet, row, how):
                differentiate_run(packet, place, size, 0, given, 1, kind, real, how)
            else:
                clear_run(packet.dx, place, size, kind, real)
                if packet.dresidual:
                    clear_run(packet.dresidual, place, size, kind, real)
