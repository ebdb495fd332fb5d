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

from .access import LINE, load, prefetch, size_of, store
from .activations import within
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
from .statistics import FACTORS, affine, finish_moments, finish_sums, merged, rounded, slopes
from .vector import function, is_simple, multiply_add, splat

_STRIP = 8  # rows that are added to the sums of a vector of columns while these are in registers
_ROWS = 64  # rows that are summed in float32; sums of blocks are added in float64


@function
def _add_deviations(
    packet: Any,
    unit: Any,
    last: Any,
    column: Any,
    end: Any,
    center: Any,
    factor: Any,
    sums: Any,
    kind: Any,
    real: Any,
    how: Any,
) -> None:
    """Set the two rows of sums, per column, to those of x * factor - center and of its square."""
    clear(sums)
    centers, first = center.ctypes.data, sums.ctypes.data
    second = first + sums.shape[1] * size_of(real)
    fold, scale = units_in_a_row(packet), splat(factor, real)
    strip = _STRIP * packet.columns * size_of(kind)
    while unit < last:
        end_of_strip = min(last, unit + _STRIP * fold)
        whole = (end_of_strip - unit) % fold == 0
        for start in range(0, end - column, LANES):
            offset = start * size_of(real)
            s, q = load(first + offset, real), load(second + offset, real)
            middle = load(centers + offset, real)
            if is_simple(how) and whole and start + LANES <= end - column:
                address = packet.x + place_of(packet, unit, column + start) * size_of(kind)
                for _ in range(unit, end_of_strip, fold):
                    for line in range(0, LANES * size_of(kind), LINE):
                        prefetch(address + strip + line)
                    deviation = load(address, kind) * scale - middle
                    s, q = s + deviation, multiply_add(deviation, deviation, q)
                    address += packet.columns * size_of(kind)
            else:
                fill = middle * splat(1 / factor, real)
                for row in range(unit, end_of_strip, fold):
                    size = columns_in(packet, row, last, column, end) - start
                    if size > 0 and is_in(packet, row, how):
                        address = packet.x + place_of(packet, row, column + start) * size_of(kind)
                        deviation = some(address, size, fill, kind) * scale - middle
                        s, q = s + deviation, multiply_add(deviation, deviation, q)
            store(s, first + offset, real)
            store(q, second + offset, real)
        unit = end_of_strip


@function
def _is_finite(found: Any) -> Any:
    """Whether no m2 is infinite or NaN."""
    finite = True
    for channel in range(found.shape[1]):
        finite = finite and math.isfinite(found[1, channel])
    return finite


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
    width = end - column
    room = (width + LANES - 1) // LANES * LANES
    center, sums = np.zeros(room, real), np.empty((2, room), real)
    channels = found.shape[1]
    more, centers = np.empty((2, channels), np.float64), np.zeros(channels, np.float64)
    count, rows = 0.0, 0
    clear(found)
    while unit < last:
        block = min(_ROWS, max(2 * _STRIP, rows))
        stop = min(last, unit + block * units_in_a_row(packet))
        values = valid_values(packet, unit, stop, how)
        # Twice where a mean is to be found first: around 0, and then around what the first time found.
        for times in range(1 if count >= values else 0, 2 if values else 0):
            for channel in range(channels):
                centers[channel] = rounded(found[0, channel], real)
                if count < values:
                    centers[channel] = rounded(more[0, channel] / values, real) if times else 0.0
            spread(centers, packet, column, width, center)
            _add_deviations(packet, unit, stop, column, end, center, factor, sums, kind, real, how)
            gather(sums[0], packet, column, width, more[0], real)
            gather(sums[1], packet, column, width, more[1], real)
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
        rows += block
        unit = stop
    return count


@function
def forward(packet: Any, index: Any, kind: Any, real: Any, how: Any) -> None:
    """Take a task's moments, write its y, or both; statistics of all parts are merged in between."""
    part, group, unit, last, column, end = task_of(packet, index)
    width = end - column
    first_channel, channels, _, _, _ = layout(packet, column, width)
    if packet.measure:
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
        counts, means, m2s = numbers(packet.count, size), numbers(packet.mean, size), numbers(packet.m2, size)
        for channel in range(channels):
            counts[place + channel] = count
            means[place + channel] = found[0, channel]
            m2s[place + channel] = found[1, channel]
            if packet.parts == 1:
                finish_moments(packet, group, first_channel + channel)
    if packet.apply:
        given = np.empty((PARAMETERS, width + LANES), real)
        _set_affine(packet, group, column, width, given, real)
        for row in range(unit, last, units_in_a_row(packet)):
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
        spread(values[row], packet, column, width, given[row])
    return rest


@function
def _set_slopes(packet: Any, group: Any, column: Any, width: Any, rest: Any, given: Any) -> None:
    """Set a, b and c of each column."""
    first_channel, channels, _, _, _ = layout(packet, column, width)
    values = np.empty((PARAMETERS, channels), np.float64)
    for channel in range(channels):
        _, values[A, channel], values[B, channel], values[C, channel] = slopes(
            packet, group, first_channel + channel, rest[channel]
        )
    for row in (A, B, C):
        spread(values[row], packet, column, width, given[row])


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
    strip = _STRIP * packet.columns * size_of(kind)
    low, high = splat(packet.low_kink, real), splat(packet.high_kink, real)
    while unit < last:
        end_of_strip = min(last, unit + _STRIP * fold)
        whole = (end_of_strip - unit) % fold == 0
        for start in range(0, end - column, LANES):
            offset = start * size_of(real)
            s, q = load(first + offset, real), load(second + offset, real)
            center = load(parameters + offset + CENTER * row_bytes, real)
            scale = load(parameters + offset + SCALE * row_bytes, real)
            shift = load(parameters + offset + SHIFT * row_bytes, real)
            rstd = load(parameters + offset + RSTD * row_bytes, real)
            if is_simple(how) and whole and start + LANES <= end - column:
                place = place_of(packet, unit, column + start) * size_of(kind)
                for _ in range(unit, end_of_strip, fold):
                    for line in range(0, LANES * size_of(kind), LINE):
                        prefetch(packet.x + place + strip + line)
                        prefetch(packet.dy + place + strip + line)
                    centred = load(packet.x + place, kind) - center
                    z = multiply_add(centred, scale, shift)
                    dy = within(load(packet.dy + place, kind), z, low, high, real)
                    s, q = s + dy, multiply_add(dy, centred * rstd, q)
                    place += packet.columns * size_of(kind)
            else:
                for row in range(unit, end_of_strip, fold):
                    size = columns_in(packet, row, last, column, end) - start
                    if size > 0 and is_in(packet, row, how):
                        place = place_of(packet, row, column + start)
                        centred = some(packet.x + place * size_of(kind), size, center, kind) - center
                        dy = incoming(packet, place, size, centred, scale, shift, low, high, kind, real, how)
                        s, q = s + dy, multiply_add(dy, centred * rstd, q)
            store(s, first + offset, real)
            store(q, second + offset, real)
        unit = end_of_strip


@function
def backward(packet: Any, index: Any, kind: Any, real: Any, how: Any) -> None:
    """Take the sums of a task's gradient, write its dx, or both; sums of all parts are added in between."""
    part, group, unit, last, column, end = task_of(packet, index)
    width = end - column
    first_channel, channels, _, _, _ = layout(packet, column, width)
    given = np.zeros((PARAMETERS, width + LANES), real)
    rest = _set_affine(packet, group, column, width, given, real)
    fold = units_in_a_row(packet)
    if packet.measure:
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
        counts, rstds = numbers(packet.count, size), numbers(packet.rstd, packet.groups * packet.channels)
        sums_dy, products = numbers(packet.sum_dy, size), numbers(packet.sum_dy_xhat, size)
        for channel in range(channels):
            rstd = rstds[group * packet.channels + first_channel + channel]
            counts[place + channel] = count
            sums_dy[place + channel] = found[0, channel]
            products[place + channel] = found[1, channel] - rest[channel] * rstd * found[0, channel]
            if packet.parts == 1:
                finish_sums(packet, group, first_channel + channel, real)
    if packet.apply:
        _set_slopes(packet, group, column, width, rest, given)
        for row in range(unit, last, fold):
            size = columns_in(packet, row, last, column, end)
            place = place_of(packet, row, column)
            if is_in(packet, row, how):
                differentiate_run(packet, place, size, 0, given, 1, kind, real, how)
            else:
                clear_run(packet.dx, place, size, kind, real)
                if packet.dresidual:
                    clear_run(packet.dresidual, place, size, kind, real)
