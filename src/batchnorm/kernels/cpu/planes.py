"""Computes forward and backward of contiguous `[N, C, *S]`, where values of one channel lie side by side.

A task takes one channel of one group of samples; or a part of it where there are few channels, or several
channels where they are small. Most of what it reads for the statistics is still in the cache when it is
normalized.
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
from .kernel_args import numbers, parameter, table
from .llvm import LANES
from .statistics import FACTORS, affine, is_far, merged, rounded, set_coefficients, set_rstd
from .vector import function, is_simple, multiply_add, part_of_one, splat, total

_BLOCK = 8192  # values that are summed in float32; sums of blocks are added in float64
_FIRST = 256  # values whose mean is the center of the first block


@function
def _task(args: Any, index: Any) -> Any:
    """Returns a task's part and group, the range of its channels, and of its values in each channel."""
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
    """Returns the values of a block: several whole runs if they are shorter than a block."""
    return _BLOCK // args.positions * args.positions if args.positions < _BLOCK else _BLOCK


@function
def _run(args: Any, channel: Any, at: Any, last: Any) -> Any:
    """Returns the index in the tensor of value `at` of a channel, and the values of its run from there on."""
    sample, position = divmod(at, args.positions)
    place = (sample * args.channels + channel) * args.positions + position
    return place, min(args.positions - position, last - at)


@function
def _last_run(args: Any, channel: Any, first: Any, last: Any) -> Any:
    """Returns the index and the size of the last run before value `last`, which the cache still has."""
    size = min((last - 1) % args.positions + 1, last - first)
    place, _ = _run(args, channel, last - size, last)
    return place, size


@function
def _valid(args: Any, at: Any, last: Any, variant: Any) -> Any:
    """Returns how many of a channel's values from `at` to `last` the mask leaves in."""
    if is_simple(variant) or not args.mask:
        return np.float64(last - at)
    one, zero = splat(1.0, np.float32), splat(0.0, np.float32)
    found = zero  # exact: a block has less than 2^24 values
    while at < last:
        found = found + keep_valid(one, args.mask + at, min(LANES, last - at), zero)
        at += LANES
    return np.float64(total(found))


@function
def _values(args: Any, place: Any, at: Any, count: Any, fill: Any, variant: Any) -> Any:
    """Returns up to LANES values of x, with `fill` in masked lanes and in those from `count` on."""
    dtype = variant.dtype
    values = some(args.x + place * size_of(dtype), count, fill, dtype)
    if args.mask and not is_simple(variant):
        values = keep_valid(values, args.mask + at, count, fill)
    return values


@function
def _sum(args: Any, channel: Any, at: Any, last: Any, factor: Any, variant: Any) -> Any:
    """Returns the sum of values x * factor."""
    real = variant.real
    zero, found, scale = splat(0.0, real), splat(0.0, real), splat(factor, real)
    while at < last:
        place, size = _run(args, channel, at, last)
        for start in range(0, size, LANES):
            values = _values(args, place + start, at + start, min(LANES, size - start), zero, variant)
            found = found + values * scale
        at += size
    return total(found)


@function
def _sum_deviations(
    args: Any, channel: Any, at: Any, last: Any, center: Any, factor: Any, variant: Any
) -> Any:
    """Returns the sums of a block's deviations x * factor - center, and of their squares."""
    dtype, real = variant.dtype, variant.real
    fill, scale = splat(center / factor, real), splat(factor, real)
    middle, zero = splat(center, real), splat(0.0, real)
    s0, s1, s2, s3 = zero, zero, zero, zero
    q0, q1, q2, q3 = zero, zero, zero, zero
    step = LANES * size_of(dtype)
    next_sample = args.channels * args.positions * size_of(dtype)
    while at < last:
        place, size = _run(args, channel, at, last)
        address = args.x + place * size_of(dtype)
        start = 0
        while start + 4 * LANES <= size:
            for line in range(0, 4 * step, LINE):
                prefetch(address + next_sample + line)
            v0 = load(address, dtype) * scale - middle
            v1 = load(address + step, dtype) * scale - middle
            v2 = load(address + 2 * step, dtype) * scale - middle
            v3 = load(address + 3 * step, dtype) * scale - middle
            if not is_simple(variant) and args.mask:
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
            values = _values(args, place + start, at + start, min(LANES, size - start), fill, variant)
            v0 = values * scale - middle
            s0, q0 = s0 + v0, multiply_add(v0, v0, q0)
            start += LANES
        at += size
    return total((s0 + s1) + (s2 + s3)), total((q0 + q1) + (q2 + q3))


@part_of_one
def _moments(args: Any, channel: Any, at: Any, last: Any, factor: Any, variant: Any) -> Any:
    """Returns count, mean and m2 of a task's values x * factor.

    Deviations are taken from the mean so far. That costs no accuracy: a block that lies far from it adds the
    square of the distance to m2, which is then no smaller than the rounding. That does not hold for a block
    of more values than all before it, such as the first: it is summed again where it lies far from its first
    values' mean.
    """
    real = variant.real
    count, mean, m2 = 0.0, 0.0, 0.0
    length = _block(args)
    while at < last:
        end = min(last, at + length)
        more = _valid(args, at, end, variant)
        if more > 0:
            center = mean
            if count < more:
                stop = min(end, at + _FIRST)
                seen = max(_valid(args, at, stop, variant), 1.0)
                center = _sum(args, channel, at, stop, factor, variant) / seen
            center = rounded(center, real)
            deviations, squares = _sum_deviations(args, channel, at, end, center, factor, variant)
            if count < more and is_far(deviations, squares, more):
                center = rounded(center + deviations / more, real)
                deviations, squares = _sum_deviations(args, channel, at, end, center, factor, variant)
            off = deviations / more
            mean, m2 = merged(count, mean, m2, more, center + off, squares - off * deviations)
            count += more
        at = end
    return count, mean, m2


@part_of_one
def _scaled_moments(args: Any, channel: Any, first: Any, last: Any, variant: Any) -> Any:
    """Returns count, mean and m2 of a task's values, also where their squares overflow float32."""
    count, mean, m2 = 0.0, 0.0, math.nan
    for factor in FACTORS:
        if not math.isfinite(m2):  # float32 has overflowed; or x is not finite, and stays so
            count, mean, m2 = _moments(args, channel, first, last, factor, variant)
            mean, m2 = mean / factor, m2 / factor / factor
    return count, mean, m2


@part_of_one
def _measure(args: Any, part: Any, group: Any, channel: Any, first: Any, last: Any, variant: Any) -> None:
    """Writes the moments of a channel, of a part of a group."""
    count, mean, m2 = _scaled_moments(args, channel, first, last, variant)
    piece, size = part * args.groups + group, args.parts * args.groups * args.channels
    if channel == 0:
        numbers(args.part_count, args.parts * args.groups)[piece] = count
    numbers(args.part_mean, size)[piece * args.channels + channel] = mean
    numbers(args.part_m2, size)[piece * args.channels + channel] = m2
    if args.parts == 1:
        set_rstd(args, group, channel, 1, count)


@function
def _set_affine(args: Any, group: Any, channel: Any, given: Any, real: Any) -> Any:
    """Sets center, scale, shift and rstd; returns what rounding left of the mean."""
    size, here = args.groups * args.channels, group * args.channels + channel
    weight, bias = parameter(args.weight, channel, 1.0, real), parameter(args.bias, channel, 0.0, real)
    rstd = numbers(args.rstd, size)[here]
    center, scale, shift, rest = affine(numbers(args.mean, size)[here], rstd, weight, bias, real)
    fill(given, CENTER, center, real)
    fill(given, SCALE, scale, real)
    fill(given, SHIFT, shift, real)
    fill(given, RSTD, rstd, real)
    return rest


@function
def _set_slopes(args: Any, group: Any, channel: Any, rest: Any, given: Any, real: Any) -> None:
    """Sets a, b and c; as `statistics.set_slopes`."""
    size, here = args.groups * args.channels, group * args.channels + channel
    rstd, b = numbers(args.rstd, size)[here], numbers(args.b, size)[here]
    fill(given, A, numbers(args.a, size)[here], real)
    fill(given, B, b, real)
    fill(given, C, numbers(args.c, size)[here] - b * rest * rstd, real)


@part_of_one
def _normalize_planes(args: Any, index: Any, given: Any, variant: Any) -> None:
    """Writes y of a task of `args.planes` planes as they lie in memory, by given statistics."""
    plane, end = index * args.planes, min((index + 1) * args.planes, args.units * args.channels)
    sample, channel = divmod(plane, args.channels)
    while plane < end:
        group = sample // args.group_units if args.groups > 1 else 0
        _set_affine(args, group, channel, given, variant.real)
        mask = args.mask + sample * args.positions if args.mask else 0
        normalize_run(args, plane * args.positions, args.positions, mask, given, 0, variant)
        plane, channel = plane + 1, channel + 1
        if channel == args.channels:
            sample, channel = sample + 1, 0


@function
def forward(args: Any, index: Any, measures: Any, applies: Any, workspace: Any, variant: Any) -> None:
    """Writes a task's moments, its y, or both; statistics of all parts are merged in between."""
    given = table(workspace, 0, PARAMETERS, LANES, variant.real)
    if args.planes:
        _normalize_planes(args, index, given, variant)
        return
    part, group, channel, stop, first, end = _task(args, index)
    while channel < stop:
        if measures:
            _measure(args, part, group, channel, first, end, variant)
        if applies:
            _set_affine(args, group, channel, given, variant.real)
            last = end
            while first < last:
                place, size = _last_run(args, channel, first, last)
                last -= size
                mask = args.mask + last if args.mask else 0
                normalize_run(args, place, size, mask, given, 0, variant)
        channel += 1


@function
def _sums(args: Any, channel: Any, at: Any, last: Any, given: Any, variant: Any) -> Any:
    """Returns Σ dy' and Σ dy' (x - center) rstd of a block."""
    dtype, real = variant.dtype, variant.real
    zero = splat(0.0, real)
    center, scale = splat(given[CENTER, 0], real), splat(given[SCALE, 0], real)
    shift, rstd = splat(given[SHIFT, 0], real), splat(given[RSTD, 0], real)
    low, high = splat(args.low_kink, real), splat(args.high_kink, real)
    s0, s1, q0, q1 = zero, zero, zero, zero
    bounds = is_bounds(args, variant)
    step = LANES * size_of(dtype)
    next_sample = args.channels * args.positions * size_of(dtype)
    while at < last:
        place, size = _run(args, channel, at, last)
        x, dy = args.x + place * size_of(dtype), args.dy + place * size_of(dtype)
        residual = args.residual + place * size_of(dtype) if args.residual else 0
        start = 0
        while bounds and start + 2 * LANES <= size:
            for line in range(0, 2 * step, LINE):
                prefetch(x + next_sample + line)
                prefetch(dy + next_sample + line)
            v0, v1 = load(x, dtype) - center, load(x + step, dtype) - center
            z0, z1 = multiply_add(v0, scale, shift), multiply_add(v1, scale, shift)
            if residual:
                z0, z1 = z0 + load(residual, dtype), z1 + load(residual + step, dtype)
                residual += 2 * step
            d0 = within(load(dy, dtype), z0, low, high, real)
            d1 = within(load(dy + step, dtype), z1, low, high, real)
            if not is_simple(variant) and args.mask:
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
            centred = _values(args, place + start, at + start, count, center, variant) - center
            d0 = incoming(args, place + start, count, centred, scale, shift, low, high, variant)
            if args.mask and not is_simple(variant):
                d0 = keep_valid(d0, args.mask + at + start, count, zero)
            s0, q0 = s0 + d0, multiply_add(d0, centred * rstd, q0)
            start += LANES
        at += size
    return total(s0 + s1), total(q0 + q1)


@part_of_one
def _sum_gradients(
    args: Any, part: Any, group: Any, channel: Any, first: Any, end: Any, rest: Any, given: Any, variant: Any
) -> None:
    """Writes the gradient's sums of a channel, of a part of a group."""
    count, sum_dy, sum_dy_xhat = 0.0, 0.0, 0.0
    at, length = first, _block(args)
    while at < end:
        until = min(end, at + length)
        count += _valid(args, at, until, variant)
        found, product = _sums(args, channel, at, until, given, variant)
        sum_dy += found
        sum_dy_xhat += product
        at = until
    piece, size = part * args.groups + group, args.groups * args.channels
    rstd = numbers(args.rstd, size)[group * args.channels + channel]
    if channel == 0:
        numbers(args.part_count, args.parts * args.groups)[piece] = count
    place = piece * args.channels + channel
    numbers(args.part_dy, args.parts * size)[place] = sum_dy
    numbers(args.part_dy_xhat, args.parts * size)[place] = sum_dy_xhat - rest * rstd * sum_dy
    if args.parts == 1:
        set_coefficients(args, group, channel, 1, count, variant.real)


@function
def backward(args: Any, index: Any, measures: Any, applies: Any, workspace: Any, variant: Any) -> None:
    """Writes the sums of a task's gradient, its dx, or both; sums of all parts are added in between."""
    part, group, channel, stop, first, end = _task(args, index)
    given = table(workspace, 0, PARAMETERS, LANES, variant.real)
    while channel < stop:
        rest = _set_affine(args, group, channel, given, variant.real)
        if measures:
            _sum_gradients(args, part, group, channel, first, end, rest, given, variant)
        if applies:
            _set_slopes(args, group, channel, rest, given, variant.real)
            last = end
            while first < last:
                place, size = _last_run(args, channel, first, last)
                last -= size
                mask = args.mask + last if args.mask else 0
                differentiate_run(args, place, size, mask, given, 0, variant)
        channel += 1
