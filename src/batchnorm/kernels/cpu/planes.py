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
from .elementwise import (
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
from .kernel_args import numbers, table
from .llvm import LANES
from .statistics import FACTORS, affine, is_far, merged, rounded, set_coefficients, set_rstd, slopes
from .vector import function, is_simple, multiply_add, part_of_one, splat, total

_BLOCK = 8192  # values that are summed in float32; sums of blocks are added in float64
_GLANCE = 256  # values whose mean is taken for the first block's, to begin with


@function
def _task(args: Any, index: Any) -> Any:
    """Return part, group, channels, and the task's first and last value, counted along a channel."""
    rest, block = divmod(index, (args.channels + args.block - 1) // args.block)
    part, group = divmod(rest, args.groups)
    unit = group * args.group_units
    values = (min(args.units, unit + args.group_units) - unit) * args.positions
    start = unit * args.positions
    return (
        part,
        group,
        block * args.block,
        min(args.channels, (block + 1) * args.block),
        start + values * part // args.parts,
        start + values * (part + 1) // args.parts,
    )


@function
def _block(args: Any) -> Any:
    """Return the values of a block: whole runs, where these are shorter."""
    return _BLOCK // args.positions * args.positions if args.positions < _BLOCK else _BLOCK


@function
def _run(args: Any, channel: Any, at: Any, last: Any) -> Any:
    """Return where value `at` of a channel lies in its tensor, and how many follow side by side."""
    sample, position = divmod(at, args.positions)
    place = (sample * args.channels + channel) * args.positions + position
    return place, min(args.positions - position, last - at)


@function
def _last_run(args: Any, channel: Any, first: Any, last: Any) -> Any:
    """Return where the last values before `last` lie side by side, and how many: the cache still has them."""
    size = min((last - 1) % args.positions + 1, last - first)
    place, _ = _run(args, channel, last - size, last)
    return place, size


@function
def _valid(args: Any, at: Any, last: Any, how: Any) -> Any:
    """Return how many values count, of those from `at` to `last` of a channel."""
    if is_simple(how) or not args.mask:
        return np.float64(last - at)
    one, zero = splat(1.0, np.float32), splat(0.0, np.float32)
    found = zero  # exact: a block has less than 2^24 values
    while at < last:
        found = found + keep_valid(one, args.mask + at, min(LANES, last - at), zero)
        at += LANES
    return np.float64(total(found))


@function
def _values(args: Any, place: Any, at: Any, count: Any, fill: Any, kind: Any, how: Any) -> Any:
    """Return up to LANES values of x, and `fill` where there are less, or where masked."""
    values = some(args.x + place * size_of(kind), count, fill, kind)
    if args.mask and not is_simple(how):
        values = keep_valid(values, args.mask + at, count, fill)
    return values


@function
def _sum(args: Any, channel: Any, at: Any, last: Any, factor: Any, kind: Any, real: Any, how: Any) -> Any:
    """Return the sum of a block's values, each times `factor`."""
    zero, found, scale = splat(0.0, real), splat(0.0, real), splat(factor, real)
    while at < last:
        place, size = _run(args, channel, at, last)
        for start in range(0, size, LANES):
            values = _values(args, place + start, at + start, min(LANES, size - start), zero, kind, how)
            found = found + values * scale
        at += size
    return total(found)


@function
def _around(
    args: Any, channel: Any, at: Any, last: Any, center: Any, factor: Any, kind: Any, real: Any, how: Any
) -> Any:
    """Return the sums of a block's deviations x * factor - center, and of their squares."""
    fill, scale = splat(center / factor, real), splat(factor, real)
    middle, zero = splat(center, real), splat(0.0, real)
    s0, s1, s2, s3 = zero, zero, zero, zero
    q0, q1, q2, q3 = zero, zero, zero, zero
    step = LANES * size_of(kind)
    next_sample = args.channels * args.positions * size_of(kind)
    while at < last:
        place, size = _run(args, channel, at, last)
        address = args.x + place * size_of(kind)
        start = 0
        while start + 4 * LANES <= size:
            for line in range(0, 4 * step, LINE):
                prefetch(address + next_sample + line)
            v0 = load(address, kind) * scale - middle
            v1 = load(address + step, kind) * scale - middle
            v2 = load(address + 2 * step, kind) * scale - middle
            v3 = load(address + 3 * step, kind) * scale - middle
            if not is_simple(how) and args.mask:
                mask = args.mask + at + start
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
            values = _values(args, place + start, at + start, min(LANES, size - start), fill, kind, how)
            v0 = values * scale - middle
            s0, q0 = s0 + v0, multiply_add(v0, v0, q0)
            start += LANES
        at += size
    return total((s0 + s1) + (s2 + s3)), total((q0 + q1) + (q2 + q3))


@part_of_one
def _moments(args: Any, channel: Any, at: Any, last: Any, factor: Any, kind: Any, real: Any, how: Any) -> Any:
    """Return count, mean and m2 of a task's values, each times `factor`.

    Deviations are taken from the mean so far. That costs no accuracy: a block that lies far from it adds the
    square of the distance to m2, which is then no smaller than the rounding. For a block of more values than
    all before it, such as the first, that does not hold: it is done again where its mean was guessed badly.
    """
    count, mean, m2 = 0.0, 0.0, 0.0
    length = _block(args)
    while at < last:
        end = min(last, at + length)
        more = _valid(args, at, end, how)
        if more > 0:
            center = mean
            if count < more:
                glance = min(end, at + _GLANCE)
                seen = max(_valid(args, at, glance, how), 1.0)
                center = _sum(args, channel, at, glance, factor, kind, real, how) / seen
            center = rounded(center, real)
            deviations, squares = _around(args, channel, at, end, center, factor, kind, real, how)
            if count < more and is_far(deviations, squares, more):
                center = rounded(center + deviations / more, real)
                deviations, squares = _around(args, channel, at, end, center, factor, kind, real, how)
            off = deviations / more
            mean, m2 = merged(count, mean, m2, more, center + off, squares - off * deviations)
            count += more
        at = end
    return count, mean, m2


@part_of_one
def careful_moments(args: Any, channel: Any, first: Any, last: Any, kind: Any, real: Any, how: Any) -> Any:
    """Return count, mean and m2 of a task's values, also where their squares overflow float32."""
    count, mean, m2 = 0.0, 0.0, math.nan
    for factor in FACTORS:
        if not math.isfinite(m2):  # float32 has overflowed; or x is not finite, and stays so
            count, mean, m2 = _moments(args, channel, first, last, factor, kind, real, how)
            mean, m2 = mean / factor, m2 / factor / factor
    return count, mean, m2


@function
def set_affine(args: Any, group: Any, channel: Any, given: Any, real: Any) -> Any:
    """Set center, scale, shift and rstd; return what rounding left of the mean."""
    center, scale, shift, rest = affine(args, group, channel, real)
    rstd = numbers(args.rstd, args.groups * args.channels)[group * args.channels + channel]
    fill(given, CENTER, center, real)
    fill(given, SCALE, scale, real)
    fill(given, SHIFT, shift, real)
    fill(given, RSTD, rstd, real)
    return rest


@function
def forward(
    args: Any, index: Any, measures: Any, applies: Any, workspace: Any, kind: Any, real: Any, how: Any
) -> None:
    """Take a task's moments, write its y, or both; statistics of all parts are merged in between.

    Where there are no moments to take, a task is a number of planes as they lie in memory.
    """
    part, group, channel, stop, first, start = _task(args, index)
    plane, end = index * args.planes, min((index + 1) * args.planes, args.units * args.channels)
    sample = 0
    if args.planes:
        sample, channel = divmod(plane, args.channels)
        stop = channel + 1
    given = table(workspace, 0, PARAMETERS, LANES, real)
    while channel < stop:
        last = start
        if measures:
            count, mean, m2 = careful_moments(args, channel, first, last, kind, real, how)
            size = args.parts * args.groups * args.channels
            place = (part * args.groups + group) * args.channels + channel
            if channel == 0:
                numbers(args.part_count, args.parts * args.groups)[part * args.groups + group] = count
            numbers(args.part_mean, size)[place] = mean
            numbers(args.part_m2, size)[place] = m2
            if args.parts == 1:
                set_rstd(args, group, channel, channel + 1, count)
        if applies and not args.planes:
            set_affine(args, group, channel, given, real)
        while applies and (plane < end if args.planes else first < last):
            if args.planes:
                group = sample // args.group_units if args.groups > 1 else 0
                set_affine(args, group, channel, given, real)
                place, size, at = plane * args.positions, args.positions, sample * args.positions
                plane, channel = plane + 1, channel + 1
                if channel == args.channels:
                    sample, channel = sample + 1, 0
            else:
                place, size = _last_run(args, channel, first, last)
                last -= size
                at = last
            mask = args.mask + at if args.mask else 0
            normalize_run(args, place, size, mask, given, 0, kind, real, how)
        channel = stop if args.planes else channel + 1


@function
def _sums(args: Any, channel: Any, at: Any, last: Any, given: Any, kind: Any, real: Any, how: Any) -> Any:
    """Return Σ dy' and Σ dy' (x - center) rstd of a block."""
    zero = splat(0.0, real)
    center, scale = splat(given[CENTER, 0], real), splat(given[SCALE, 0], real)
    shift, rstd = splat(given[SHIFT, 0], real), splat(given[RSTD, 0], real)
    low, high = splat(args.low_kink, real), splat(args.high_kink, real)
    s0, s1, q0, q1 = zero, zero, zero, zero
    bounds = is_bounds(args, how)
    step = LANES * size_of(kind)
    next_sample = args.channels * args.positions * size_of(kind)
    while at < last:
        place, size = _run(args, channel, at, last)
        x, dy = args.x + place * size_of(kind), args.dy + place * size_of(kind)
        residual = args.residual + place * size_of(kind) if args.residual else 0
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
            if not is_simple(how) and args.mask:
                mask = args.mask + at + start
                v0, v1 = keep_valid(v0, mask, LANES, zero), keep_valid(v1, mask + LANES, LANES, zero)
                d0, d1 = keep_valid(d0, mask, LANES, zero), keep_valid(d1, mask + LANES, LANES, zero)
            s0, q0 = s0 + d0, multiply_add(d0, v0 * rstd, q0)
            s1, q1 = s1 + d1, multiply_add(d1, v1 * rstd, q1)
            start += 2 * LANES
            x += 2 * step
            dy += 2 * step
        while start < size:
            count = min(LANES, size - start)
            centred = _values(args, place + start, at + start, count, center, kind, how) - center
            d0 = incoming(args, place + start, count, centred, scale, shift, low, high, kind, real, how)
            if args.mask and not is_simple(how):
                d0 = keep_valid(d0, args.mask + at + start, count, zero)
            s0, q0 = s0 + d0, multiply_add(d0, centred * rstd, q0)
            start += LANES
        at += size
    return total(s0 + s1), total(q0 + q1)


@function
def backward(
    args: Any, index: Any, measures: Any, applies: Any, workspace: Any, kind: Any, real: Any, how: Any
) -> None:
    """Take the sums of a task's gradient, write its dx, or both; sums of all parts are added in between."""
    part, group, channel, stop, first, end = _task(args, index)
    given = table(workspace, 0, PARAMETERS, LANES, real)
    size = args.groups * args.channels
    while channel < stop:
        rest = set_affine(args, group, channel, given, real)
        rstd = numbers(args.rstd, size)[group * args.channels + channel]
        if measures:
            count, sum_dy, sum_dy_xhat = 0.0, 0.0, 0.0
            at, length = first, _block(args)
            while at < end:
                until = min(end, at + length)
                count += _valid(args, at, until, how)
                found, product = _sums(args, channel, at, until, given, kind, real, how)
                sum_dy += found
                sum_dy_xhat += product
                at = until
            place = (part * args.groups + group) * args.channels + channel
            if channel == 0:
                numbers(args.part_count, args.parts * args.groups)[part * args.groups + group] = count
            numbers(args.part_dy, args.parts * size)[place] = sum_dy
            numbers(args.part_dy_xhat, args.parts * size)[place] = sum_dy_xhat - rest * rstd * sum_dy
            if args.parts == 1:
                set_coefficients(args, group, channel, channel + 1, count, real)
        if applies:
            a, b, c = slopes(args, group, channel, rest)
            fill(given, A, a, real)
            fill(given, B, b, real)
            fill(given, C, c, real)
            last = end
            while first < last:
                place, run = _last_run(args, channel, first, last)
                last -= run
                mask = args.mask + last if args.mask else 0
                differentiate_run(args, place, run, mask, given, 0, kind, real, how)
        channel += 1
