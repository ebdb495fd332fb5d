"""Merges moments and sums of several parts, per channel in float64, and computes parameters from them.

Groups of a few values have as much work per channel as per value. So functions on many channels read their
addresses from the arguments before a loop: the compiler vectorizes the loop only then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from .access import pointer, size_of
from .kernel_args import numbers, plain, set_parameter
from .vector import function

# x is multiplied by the first for its moments, and by the second where squares overflow float32, as those of
# 1e20 do. A power of two costs no digit; this one makes thousands of squares of the largest float32 fit into
# one.
FACTORS = (1.0, 2.0**-70)
CHANNELS = 256  # of a merging task


@function
def merged(count: Any, mean: Any, m2: Any, more: Any, other_mean: Any, other_m2: Any) -> Any:
    """Returns mean and m2 of a union of `count` and `more` values, not both 0, by Chan's formula."""
    total = count + more
    apart = other_mean - mean
    return mean + apart * (more / total), m2 + other_m2 + apart * apart * (count * (more / total))


@function
def is_far(deviations: Any, squares: Any, count: Any) -> Any:
    """Returns whether a center is more than two standard deviations from the mean, which costs digits.

    Args:
        deviations, squares: sums of the deviations from the center, and of their squares.
        count: number of values.
    """
    return deviations * deviations > 0.8 * count * squares


@function
def rounded(value: Any, real: Any) -> Any:
    """Returns a number rounded to the dtype of the arithmetic."""
    return np.float64(real(value))


@function
def set_rstd(args: Any, group: Any, first: Any, size: Any, count: Any) -> None:
    """Writes rstd = 1 / sqrt(m2 / count + eps) of `size` channels from `first` on."""
    start, eps = 8 * (group * args.channels + first), args.eps
    m2, rstd = numbers(args.m2 + start, size), numbers(args.rstd + start, size)
    share = 1.0 / max(count, 1.0)
    for channel in range(size):
        rstd[channel] = 1.0 / np.sqrt(m2[channel] * share + eps)


@function
def set_coefficients(args: Any, group: Any, first: Any, size: Any, count: Any, real: Any) -> None:
    """Writes a, b and c of dx = a dy' + b x̂ + c of `size` channels from `first` on, and dweight and dbias.

    For statistics of the batch, with n = count: a = weight rstd, b = -a Σ(dy' x̂)/n and c = -a Σdy'/n. For
    constant statistics, b = c = 0.
    """
    start = 8 * (group * args.channels + first)
    sums, products = numbers(args.sum_dy + start, size), numbers(args.sum_dy_xhat + start, size)
    a, b = numbers(args.a + start, size), numbers(args.b + start, size)
    c, rstd = numbers(args.c + start, size), numbers(args.rstd + start, size)
    _read_parameters(args.weight, first, 1.0, a, real)
    constant, share = args.constant, -1.0 / max(count, 1.0)
    for channel in range(size):
        slope = a[channel] * rstd[channel]
        # 0 times a sum that is not finite would be NaN, for all of the channel.
        a[channel], b[channel] = slope, 0.0 if constant else slope * share * products[channel]
        c[channel] = 0.0 if constant else slope * share * sums[channel]
    if args.dweight:
        for channel in range(size):
            set_parameter(args.dweight, first + channel, products[channel], real)
            set_parameter(args.dbias, first + channel, sums[channel], real)


@function
def _read_parameters(address: Any, first: Any, missing: Any, values: Any, real: Any) -> None:
    """Sets `values` to weights or biases from channel `first` on; to `missing` where the address is 0."""
    size = values.size
    if address:
        given = carray(pointer(address + first * size_of(real)), (size,), real)
        for channel in range(size):
            values[channel] = plain(np.float64(given[channel]))
    else:
        for channel in range(size):
            values[channel] = missing


@function
def affine(mean: Any, rstd: Any, weight: Any, bias: Any, real: Any) -> Any:
    """Returns center, scale and shift of z = (x - center) * scale + shift, and the mean minus the center.

    The center is the mean, rounded: x - center is then exact where it matters.
    """
    mean, rstd = plain(mean), plain(rstd)
    center = rounded(mean, real)
    rest, scale = mean - center, weight * rstd
    return center, scale, bias - rest * scale, rest


@function
def set_affine(
    args: Any, group: Any, first: Any, centers: Any, scales: Any, shifts: Any, rest: Any, real: Any
) -> None:
    """Sets four arrays to what `affine` returns, of as many channels from `first` on as they have numbers."""
    start, size = 8 * (group * args.channels + first), rest.size
    means, rstds = numbers(args.mean + start, size), numbers(args.rstd + start, size)
    _read_parameters(args.weight, first, 1.0, scales, real)
    _read_parameters(args.bias, first, 0.0, shifts, real)
    for channel in range(size):
        centers[channel], scales[channel], shifts[channel], rest[channel] = affine(
            means[channel], rstds[channel], scales[channel], shifts[channel], real
        )


@function
def set_slopes(args: Any, group: Any, first: Any, rest: Any, a: Any, b: Any, c: Any) -> None:
    """Sets a, b and c of dx = a dy' + b (x - center) rstd + c, of all their channels, from `first` on.

    The coefficients in the arguments belong to x̂ = (x - mean) rstd: c takes in the difference, `rest` of the
    mean.
    """
    start, size = 8 * (group * args.channels + first), rest.size
    rstds, given_a = numbers(args.rstd + start, size), numbers(args.a + start, size)
    given_b, given_c = numbers(args.b + start, size), numbers(args.c + start, size)
    for channel in range(size):
        a[channel], b[channel] = given_a[channel], given_b[channel]
        c[channel] = given_c[channel] - b[channel] * rest[channel] * rstds[channel]


@function
def channels_of(args: Any, block: Any) -> Any:
    """Returns the first channel of a block of CHANNELS channels, and the end of its channels."""
    return block * CHANNELS, min(args.channels, (block + 1) * CHANNELS)


@function
def _task(args: Any, index: Any) -> Any:
    """Returns a merging task's group, its first channel, and the end of its channels."""
    group, block = divmod(index, (args.channels + CHANNELS - 1) // CHANNELS)
    first, end = channels_of(args, block)
    return group, first, end


@function
def unite(
    pieces: Any, counts: Any, next_count: Any, means: Any, m2s: Any, apart: Any, mean: Any, m2: Any, size: Any
) -> Any:
    """Writes mean and m2 of the union of some pieces, merged in their order, and returns its count.

    Args:
        pieces: number of pieces.
        counts: address of the first piece's count; the others follow every `next_count` numbers.
        next_count: see counts.
        means, m2s: addresses of the first piece's; the others follow every `apart` numbers.
        apart: see means.
        mean, m2: addresses of the union's.
        size: number of channels.
    """
    values, united, squares = numbers(counts, pieces * next_count), numbers(mean, size), numbers(m2, size)
    for channel in range(size):
        united[channel], squares[channel] = 0.0, 0.0
    count = 0.0
    for piece in range(pieces):
        more = values[piece * next_count]
        if more > 0:
            start = 8 * piece * apart
            piece_mean, piece_m2 = numbers(means + start, size), numbers(m2s + start, size)
            for channel in range(size):
                united[channel], squares[channel] = merged(
                    count, united[channel], squares[channel], more, piece_mean[channel], piece_m2[channel]
                )
            count += more
    return count


@function
def merge_moments(args: Any, index: Any, real: Any) -> None:  # noqa: ARG001
    """Merges the parts' moments of a task's channels, and writes their rstd."""
    group, first, end = _task(args, index)
    size, place = args.groups * args.channels, 8 * (group * args.channels + first)
    counts, means, m2s = args.part_count + 8 * group, args.part_mean + place, args.part_m2 + place
    mean, m2 = args.mean + place, args.m2 + place
    count = unite(args.parts, counts, args.groups, means, m2s, size, mean, m2, end - first)
    numbers(args.count, args.groups)[group] = count
    set_rstd(args, group, first, end - first, count)


@function
def merge_sums(args: Any, index: Any, real: Any) -> None:
    """Adds up the parts' sums of a task's channels, and writes their coefficients."""
    group, first, end = _task(args, index)
    size, groups = args.groups * args.channels, args.groups
    counts = numbers(args.part_count, args.parts * groups)
    sum_dy, sum_dy_xhat = numbers(args.sum_dy, size), numbers(args.sum_dy_xhat, size)
    sums, products = numbers(args.part_dy, args.parts * size), numbers(args.part_dy_xhat, args.parts * size)
    start = group * args.channels
    for here in range(start + first, start + end):
        sum_dy[here], sum_dy_xhat[here] = 0.0, 0.0
    count = 0.0
    for part in range(args.parts):
        for here in range(start + first, start + end):
            sum_dy[here] += sums[part * size + here]
            sum_dy_xhat[here] += products[part * size + here]
        count += counts[part * groups + group]
    set_coefficients(args, group, first, end - first, count, real)
