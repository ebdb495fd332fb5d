"""Per channel, in float64: moments and sums of a union of parts, and the parameters that follow from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .kernel_args import numbers, parameter, plain, set_parameter
from .vector import function

# What x is multiplied by for its moments: the squares of 1e20 and more overflow float32. A power of two costs
# no digit, and takes the largest float32 to where thousands of squares can be added up.
FACTORS = (1.0, 2.0**-70)


@function
def merged(count: Any, mean: Any, m2: Any, more: Any, other_mean: Any, other_m2: Any) -> Any:
    """Return mean and m2 of a union, by Chan's formula; `count` and `more` values, of which one is not 0."""
    total = count + more
    apart = other_mean - mean
    return mean + apart * (more / total), m2 + other_m2 + apart * apart * (count * (more / total))


@function
def is_far(deviations: Any, squares: Any, count: Any) -> Any:
    """Whether a center was so far from the mean, beyond two standard deviations, that digits are lost.

    Args:
        deviations, squares: sums of the deviations from the center, and of their squares.
        count: values.
    """
    return deviations * deviations > 0.8 * count * squares


@function
def rounded(value: Any, real: Any) -> Any:
    """Return a number rounded to the dtype of the arithmetic."""
    return np.float64(real(value))


@function
def set_rstd(args: Any, group: Any, first: Any, last: Any, count: Any) -> None:
    """Write rstd = 1 / sqrt(m2 / count + eps) of channels `first` to `last`."""
    size, share = args.groups * args.channels, 1.0 / max(count, 1.0)
    m2, rstd = numbers(args.m2, size), numbers(args.rstd, size)
    for here in range(group * args.channels + first, group * args.channels + last):
        rstd[here] = 1.0 / np.sqrt(m2[here] * share + args.eps)


@function
def set_coefficients(args: Any, group: Any, first: Any, last: Any, count: Any, real: Any) -> None:
    """Write the coefficients of dx = a dy' + b x̂ + c of channels `first` to `last`, and their gradients.

    Of the batch's own statistics, with n = count: a = weight rstd, b = -a Σ(dy' x̂)/n, c = -a Σdy'/n; of
    constant ones, b = c = 0.
    """
    size = args.groups * args.channels
    sums, products, rstd = (
        numbers(args.sum_dy, size),
        numbers(args.sum_dy_xhat, size),
        numbers(args.rstd, size),
    )
    a, b, c = numbers(args.a, size), numbers(args.b, size), numbers(args.c, size)
    share = -1.0 / max(count, 1.0)
    for channel in range(first, last):
        here = group * args.channels + channel
        slope = parameter(args.weight, channel, 1.0, real) * rstd[here]
        a[here], b[here], c[here] = slope, 0.0, 0.0
        if not args.constant:  # 0 times a sum that is not finite would be NaN, for all of the channel
            b[here], c[here] = slope * share * products[here], slope * share * sums[here]
        set_parameter(args.dweight, channel, products[here], real)
        set_parameter(args.dbias, channel, sums[here], real)


@function
def affine(args: Any, group: Any, channel: Any, real: Any) -> Any:
    """Return center, scale and shift of z = (x - center) * scale + shift, and what rounding left of the mean.

    The center is the mean, rounded: x - center is then exact where it matters.
    """
    size = args.groups * args.channels
    here = group * args.channels + channel
    mean, rstd = plain(numbers(args.mean, size)[here]), plain(numbers(args.rstd, size)[here])
    center = rounded(mean, real)
    rest = mean - center
    scale = parameter(args.weight, channel, 1.0, real) * rstd
    return center, scale, parameter(args.bias, channel, 0.0, real) - rest * scale, rest


@function
def slopes(args: Any, group: Any, channel: Any, rest: Any) -> Any:
    """Return a, b and c of dx = a dy' + b (x - center) rstd + c, of those that go with x̂."""
    size = args.groups * args.channels
    here = group * args.channels + channel
    rstd, b = numbers(args.rstd, size)[here], numbers(args.b, size)[here]
    return numbers(args.a, size)[here], b, numbers(args.c, size)[here] - b * rest * rstd


CHANNELS = 256  # of a task that only merges


@function
def channels_of(args: Any, block: Any) -> Any:
    """Return the first and the last channel of a block of them."""
    return block * CHANNELS, min(args.channels, (block + 1) * CHANNELS)


@function
def _task(args: Any, index: Any) -> Any:
    """Return a merging task's group, and its first and last channel."""
    group, block = divmod(index, (args.channels + CHANNELS - 1) // CHANNELS)
    first, last = channels_of(args, block)
    return group, first, last


@function
def unite(
    pieces: Any, counts: Any, next_count: Any, means: Any, m2s: Any, apart: Any, mean: Any, m2: Any, size: Any
) -> Any:
    """Write mean and m2 of the union of some pieces, in their order, and return its count.

    Args:
        pieces: how many.
        counts: address of the first piece's count; the others follow every `next_count` numbers.
        next_count: see counts.
        means, m2s: addresses of the first piece's; the others follow every `apart` numbers.
        apart: see means.
        mean, m2: addresses of the union's.
        size: channels.
    """
    values, united, squares = numbers(counts, pieces * next_count), numbers(mean, size), numbers(m2, size)
    for channel in range(size):
        united[channel], squares[channel] = 0.0, 0.0
    count = 0.0
    for piece in range(pieces):
        more = values[piece * next_count]
        if more > 0:
            piece_mean, piece_m2 = (
                numbers(means + 8 * piece * apart, size),
                numbers(m2s + 8 * piece * apart, size),
            )
            for channel in range(size):
                united[channel], squares[channel] = merged(
                    count, united[channel], squares[channel], more, piece_mean[channel], piece_m2[channel]
                )
            count += more
    return count


@function
def merge_moments(args: Any, index: Any, real: Any) -> None:  # noqa: ARG001
    """Merge the parts' moments of a task's channels, and write their rstd."""
    group, first, last = _task(args, index)
    size, place = args.groups * args.channels, 8 * (group * args.channels + first)
    count = unite(
        args.parts,
        args.part_count + 8 * group,
        args.groups,
        args.part_mean + place,
        args.part_m2 + place,
        size,
        args.mean + place,
        args.m2 + place,
        last - first,
    )
    numbers(args.count, args.groups)[group] = count
    set_rstd(args, group, first, last, count)


@function
def merge_sums(args: Any, index: Any, real: Any) -> None:
    """Add up the parts' sums of a task's channels, and write their coefficients."""
    group, first, last = _task(args, index)
    size, groups = args.groups * args.channels, args.groups
    counts, sum_dy, sum_dy_xhat = (
        numbers(args.part_count, args.parts * groups),
        numbers(args.sum_dy, size),
        numbers(args.sum_dy_xhat, size),
    )
    sums, products = (
        numbers(args.part_dy, args.parts * size),
        numbers(args.part_dy_xhat, args.parts * size),
    )
    start = group * args.channels
    for here in range(start + first, start + last):
        sum_dy[here], sum_dy_xhat[here] = 0.0, 0.0
    count = 0.0
    for part in range(args.parts):
        for here in range(start + first, start + last):
            sum_dy[here] += sums[part * size + here]
            sum_dy_xhat[here] += products[part * size + here]
        count += counts[part * groups + group]
    set_coefficients(args, group, first, last, count, real)
