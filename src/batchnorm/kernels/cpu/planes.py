"""Kernels for values of one channel that lie side by side: `[N, C, *S]`, contiguous.

A task takes one channel of one group of samples, or a part of it where there are few channels. What it reads
for the statistics is mostly in the cache still when it is read again to be normalized.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .access import LINE, keep_valid, load, prefetch, size_of
from .activations import within
from .llvm import LANES
from .packet import numbers, table
from .runs import (
    CENTER,
    PARAMETERS,
    RSTD,
    SCALE,
    SHIFT,
    A,
    B,
    C,
    differentiate_run,
    fill,
    incoming,
    is_bounds,
    normalize_run,
    some,
)
from .statistics import FACTORS, affine, is_far, merged, rounded, set_coefficients, set_rstd, slopes
from .vector import function, is_simple, multiply_add, part_of_one, splat, total

_BLOCK = 8192  # values that are summed in float32; sums of blocks are added in float64
_GLANCE = 256  # values whose mean is taken for the first block's, to begin with


@function
def _task(packet: Any, index: Any) -> Any:
    """Return part, group, channels, and the task's first and last value, counted along a channel."""
    rest, block = divmod(index, (packet.channels + packet.block - 1) // packet.block)
    part, group = divmod(rest, packet.groups)
    unit = group * packet.group_units
    values = (min(packet.units, unit + packet.group_units) - unit) * packet.positions
    start = unit * packet.positions
    return (
        part,
        group,
        block * packet.block,
        min(packet.channels, (block + 1) * packet.block),
        start + values * part // packet.parts,
        start + values * (part + 1) // packet.parts,
    )


@function
def _block(packet: Any) -> Any:
    """Return the values of a block: whole runs, where these are shorter."""
    return _BLOCK // packet.positions * packet.positions if packet.positions < _BLOCK else _BLOCK


@function
def _run(packet: Any, channel: Any, at: Any, last: Any) -> Any:
    """Return where value `at` of a channel lies in its tensor, and how many follow side by side."""
    sample, position = divmod(at, packet.positions)
    place = (sample * packet.channels + channel) * packet.positions + position
    return place, min(packet.positions - position, last - at)


@function
def _last_run(packet: Any, channel: Any, first: Any, last: Any) -> Any:
    """Return where the last values before `last` lie side by side, and how many: the cache still has them."""
    size = min((last - 1) % packet.positions + 1, last - first)
    place, _ = _run(packet, channel, last - size, last)
    return place, size


@function
def _valid(packet: Any, at: Any, last: Any, how: Any) -> Any:
    """Return how many values count, of those from `at` to `last` of a channel."""
    if is_simple(how) or not packet.mask:
        return np.float64(last - at)
    one, zero = splat(1.0, np.float32), splat(0.0, np.float32)
    found = zero  # exact: a block has less than 2^24 values
    while at < last:
        found = found + keep_valid(one, packet.mask + at, min(LANES, last - at), zero)
        at += LANES
    return np.float64(total(found))


@function
def _values(packet: Any, place: Any, at: Any, count: Any, fill: Any, kind: Any, how: Any) -> Any:
    """Return up to LANES values of x, and `fill` where there are less, or where masked."""
    values = some(packet.x + place * size_of(kind), count, fill, kind)
    if packet.mask and not is_simple(how):
        values = keep_valid(values, packet.mask + at, count, fill)
    return values


@function
def _sum(packet: Any, channel: Any, at: Any, last: Any, factor: Any, kind: Any, real: Any, how: Any) -> Any:
    """Return the sum of a block's values, each times `factor`."""
    zero, found, scale = splat(0.0, real), splat(0.0, real), splat(factor, real)
    while at < last:
        place, size = _run(packet, channel, at, last)
        for start in range(0, size, LANES):
            values = _values(packet, place + start, at + start, min(LANES, size - start), zero, kind, how)
            found = found + values * scale
        at += size
    return total(found)


@function
def _around(
    packet: Any, channel: Any, at: Any, last: Any, center: Any, factor: Any, kind: Any, real: Any, how: Any
) -> Any:
    """Return the sums of a block's deviations x * factor - center, and of their squares."""
    fill, scale = splat(center / factor, real), splat(factor, real)
    middle, zero = splat(center, real), splat(0.0, real)
    s0, s1, s2, s3 = zero, zero, zero, zero
    q0, q1, q2, q3 = zero, zero, zero, zero
    step = LANES * size_of(kind)
    next_sample = packet.channels * packet.positions * size_of(kind)
    while at < last:
        place, size = _run(packet, channel, at, last)
        address = packet.x + place * size_of(kind)
        start = 0
        while start + 4 * LANES <= size:
            for line in range(0, 4 * step, LINE):
                prefetch(address + next_sample + line)
            v0 = load(address, kind) * scale - middle
            v1 = load(address + step, kind) * scale - middle
            v2 = load(address + 2 * step, kind) * scale - middle
            v3 = load(address + 3 * step, kind) * scale - middle
            if not is_simple(how) and packet.mask:
                mask = packet.mask + at + start
                v0 = keep_valid(v0, mask, LANES, zero)
                v1 = keep_valid(v1, mask + LANES, LANES, zero)
                v2 = keep_valid(v2, mask + 2 * LANES, LANES, zero)
                v3 = keep_valid(v3, mask + 3 * LANES, LANES, zero)
            s0, s1, s2, s3 = s0 + v0, s1 + v1, s2 + v2, s3 + v3
            q0, q1 = multiply_add(v0, v0, q0), multiply_add(v1, v1, q1)
            q2, q3 = multiply_add(v2, v2, q2), multiply_add(v3, v3, q3)
            start += 4 * LANES
            address += 4 * step
        while start < size:
            values = _values(packet, place + start, at + start, min(LANES, size - start), fill, kind, how)
            v0 = values * scale - middle
            s0, q0 = s0 + v0, multiply_add(v0, v0, q0)
            start += LANES
        at += size
    return total((s0 + s1) + (s2 + s3)), total((q0 + q1) + (q2 + q3))


@part_of_one
def _moments(
    packet: Any, channel: Any, at: Any, last: Any, factor: Any, kind: Any, real: Any, how: Any
) -> Any:
    """Return count, mean and m2 of a task's values, each times `factor`.

    Deviations are taken from the mean so far. That costs no accuracy: a block that lies far from it adds the
    square of the distance to m2, which is then no smaller than the rounding. For a block of more values than
    all before it, such as the first, that does not hold: it is done again where its mean was guessed badly.
    """
    count, mean, m2 = 0.0, 0.0, 0.0
    length = _block(packet)
    while at < last:
        end = min(last, at + length)
        more = _valid(packet, at, end, how)
        if more > 0:
            center = mean
            if count < more:
                glance = min(end, at + _GLANCE)
                seen = max(_valid(packet, at, glance, how), 1.0)
                center = _sum(packet, channel, at, glance, factor, kind, real, how) / seen
            center = rounded(center, real)
            deviations, squares = _around(packet, channel, at, end, center, factor, kind, real, how)
            if count < more and is_far(deviations, squares, more):
                center = rounded(center + deviations / more, real)
                deviations, squares = _around(packet, channel, at, end, center, factor, kind, real, how)
            off = deviations / more
            mean, m2 = merged(count, mean, m2, more, center + off, squares - off * deviations)
            count += more
        at = end
    return count, mean, m2


@part_of_one
def careful_moments(packet: Any, channel: Any, first: Any, last: Any, kind: Any, real: Any, how: Any) -> Any:
    """Return count, mean and m2 of a task's values, also where their squares overflow float32."""
    count, mean, m2 = 0.0, 0.0, math.nan
    for factor in FACTORS:
        if not math.isfinite(m2):  # float32 has overflowed; or x is not finite, and stays so
            count, mean, m2 = _moments(packet, channel, first, last, factor, kind, real, how)
            mean, m2 = mean / factor, m2 / factor / factor
    return count, mean, m2


@function
def set_affine(packet: Any, group: Any, channel: Any, given: Any, real: Any) -> Any:
    """Set center, scale, shift and rstd; return what rounding left of the mean."""
    center, scale, shift, rest = affine(packet, group, channel, real)
    rstd = numbers(packet.rstd, packet.groups * packet.channels)[group * packet.channels + channel]
    fill(given, CENTER, center, real)
    fill(given, SCALE, scale, real)
    fill(given, SHIFT, shift, real)
    fill(given, RSTD, rstd, real)
    return rest


@function
def forward(
    packet: Any, index: Any, measures: Any, applies: Any, room: Any, kind: Any, real: Any, how: Any
) -> None:
    """Take a task's moments, write its y, or both; statistics of all parts are merged in between.

    Where there are no moments to take, a task is a number of planes as they lie in memory.
    """
    part, group, channel, stop, first, start = _task(packet, index)
    plane, end = index * packet.planes, min((index + 1) * packet.planes, packet.units * packet.channels)
    sample = 0
    if packet.planes:
        sample, channel = divmod(plane, packet.channels)
        stop = channel + 1
    given = table(room, 0, PARAMETERS, LANES, real)
    while channel < stop:
        last = start
        if measures:
            count, mean, m2 = careful_moments(packet, channel, first, last, kind, real, how)
            size = packet.parts * packet.groups * packet.channels
            place = (part * packet.groups + group) * packet.channels + channel
            if channel == 0:
                numbers(packet.part_count, packet.parts * packet.groups)[part * packet.groups + group] = count
            numbers(packet.part_mean, size)[place] = mean
            numbers(packet.part_m2, size)[place] = m2
            if packet.parts == 1:
                set_rstd(packet, group, channel, channel + 1, count)
        if applies and not packet.planes:
            set_affine(packet, group, channel, given, real)
        while applies and (plane < end if packet.planes else first < last):
            if packet.planes:
                group = sample // packet.group_units if packet.groups > 1 else 0
                set_affine(packet, group, channel, given, real)
                place, size, at = plane * packet.positions, packet.positions, sample * packet.positions
                plane, channel = plane + 1, channel + 1
                if channel == packet.channels:
                    sample, channel = sample + 1, 0
            else:
                place, size = _last_run(packet, channel, first, last)
                last -= size
                at = last
            mask = packet.mask + at if packet.mask else 0
            normalize_run(packet, place, size, mask, given, 0, kind, real, how)
        channel = stop if packet.planes else channel + 1


@function
def _sums(packet: Any, channel: Any, at: Any, last: Any, given: Any, kind: Any, real: Any, how: Any) -> Any:
    """Return Σ dy' and Σ dy' (x - center) rstd of a block."""
    zero = splat(0.0, real)
    center, scale = splat(given[CENTER, 0], real), splat(given[SCALE, 0], real)
    shift, rstd = splat(given[SHIFT, 0], real), splat(given[RSTD, 0], real)
    low, high = splat(packet.low_kink, real), splat(packet.high_kink, real)
    s0, s1, q0, q1 = zero, zero, zero, zero
    bounds = is_bounds(packet, how)
    step = LANES * size_of(kind)
    next_sample = packet.channels * packet.positions * size_of(kind)
    while at < last:
        place, size = _run(packet, channel, at, last)
        x, dy = packet.x + place * size_of(kind), packet.dy + place * size_of(kind)
        residual = packet.residual + place * size_of(kind) if packet.residual else 0
        start = 0
        while bounds and start + 2 * LANES <= size:
            for line in range(0, 2 * step, LINE):
                prefetch(x + next_sample + line)
                prefetch(dy + next_sample + line)
            v0, v1 = load(x, kind) - center, load(x + step, kind) - center
            z0, z1 = multiply_add(v0, scale, shift), multiply_add(v1, scale, shift)
            if residual:
                z0, z1 = z0 + load(residual, kind), z1 + load(residual + step, kind)
                residual += 2 * step
            d0 = within(load(dy, kind), z0, low, high, real)
            d1 = within(load(dy + step, kind), z1, low, high, real)
            if not is_simple(how) and packet.mask:
                mask = packet.mask + at + start
                v0, v1 = keep_valid(v0, mask, LANES, zero), keep_valid(v1, mask + LANES, LANES, zero)
                d0, d1 = keep_valid(d0, mask, LANES, zero), keep_valid(d1, mask + LANES, LANES, zero)
            s0, q0 = s0 + d0, multiply_add(d0, v0 * rstd, q0)
            s1, q1 = s1 + d1, multiply_add(d1, v1 * rstd, q1)
            start += 2 * LANES
            x += 2 * step
            dy += 2 * step
        while start < size:
            count = min(LANES, size - start)
            centred = _values(packet, place + start, at + start, count, center, kind, how) - center
            d0 = incoming(packet, place + start, count, centred, scale, shift, low, high, kind, real, how)
            if packet.mask and not is_simple(how):
                d0 = keep_valid(d0, packet.mask + at + start, count, zero)
            s0, q0 = s0 + d0, multiply_add(d0, centred * rstd, q0)
            start += LANES
        at += size
    return total(s0 + s1), total(q0 + q1)


@function
def backward(
    packet: Any, index: Any, measures: Any, applies: Any, room: Any, kind: Any, real: Any, how: Any
) -> None:
    """Take the sums of a task's gradient, write its dx, or both; sums of all parts are added in between."""
    part, group, channel, stop, first, end = _task(packet, index)
    given = table(room, 0, PARAMETERS, LANES, real)
    size = packet.groups * packet.channels
    while channel < stop:
        rest = set_affine(packet, group, channel, given, real)
        rstd = numbers(packet.rstd, size)[group * packet.channels + channel]
        if measures:
            count, sum_dy, sum_dy_xhat = 0.0, 0.0, 0.0
            at, length = first, _block(packet)
            while at < end:
                until = min(end, at + length)
                count += _valid(packet, at, until, how)
                found, product = _sums(packet, channel, at, until, given, kind, real, how)
                sum_dy += found
                sum_dy_xhat += product
                at = until
            place = (part * packet.groups + group) * packet.channels + channel
            if channel == 0:
                numbers(packet.part_count, packet.parts * packet.groups)[part * packet.groups + group] = count
            numbers(packet.part_dy, packet.parts * size)[place] = sum_dy
            numbers(packet.part_dy_xhat, packet.parts * size)[place] = sum_dy_xhat - rest * rstd * sum_dy
            if packet.parts == 1:
                set_coefficients(packet, group, channel, channel + 1, count, real)
        if applies:
            a, b, c = slopes(packet, group, channel, rest)
            fill(given, A, a, real)
            fill(given, B, b, real)
            fill(given, C, c, real)
            last = end
            while first < last:
                place, run = _last_run(packet, channel, first, last)
                last -= run
                mask = packet.mask + last if packet.mask else 0
                differentiate_run(packet, place, run, mask, given, 0, kind, real, how)
        channel += 1
