"""What statistics.py says of one channel, of many side by side, in float64: of rows.

Where groups are small these take as long as the values do. Addresses are read from the args before a loop,
not in it: then the compiler makes vectors of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from .access import pointer, size_of
from .kernel_args import numbers, plain, set_parameter
from .statistics import rounded
from .vector import function


@function
def set_rstds(args: Any, group: Any, first: Any, size: Any, count: Any) -> None:
    """As `statistics.set_rstd`, of `size` channels from `first` on."""
    start, eps = 8 * (group * args.channels + first), args.eps
    m2, rstd = numbers(args.m2 + start, size), numbers(args.rstd + start, size)
    share = 1.0 / max(count, 1.0)
    for channel in range(size):
        rstd[channel] = 1.0 / np.sqrt(m2[channel] * share + eps)


@function
def set_all_coefficients(args: Any, group: Any, first: Any, size: Any, count: Any, real: Any) -> None:
    """As `statistics.set_coefficients`, of `size` channels from `first` on."""
    start = 8 * (group * args.channels + first)
    sums, products = numbers(args.sum_dy + start, size), numbers(args.sum_dy_xhat + start, size)
    a, b = numbers(args.a + start, size), numbers(args.b + start, size)
    c, rstd = numbers(args.c + start, size), numbers(args.rstd + start, size)
    take_parameters(args.weight, first, 1.0, a, real)
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
def take_parameters(address: Any, first: Any, missing: Any, values: Any, real: Any) -> None:
    """Write weights or biases, from channel `first` on, to values: see `args.parameter`."""
    size = values.size
    if address:
        given = carray(pointer(address + first * size_of(real)), (size,), real)
        for channel in range(size):
            values[channel] = plain(np.float64(given[channel]))
    else:
        for channel in range(size):
            values[channel] = missing


@function
def set_affine(
    args: Any, group: Any, first: Any, centers: Any, scales: Any, shifts: Any, rest: Any, real: Any
) -> None:
    """Write what `affine` returns, of as many channels from `first` on as the arrays have."""
    start, size = 8 * (group * args.channels + first), rest.size
    means, rstds = numbers(args.mean + start, size), numbers(args.rstd + start, size)
    take_parameters(args.weight, first, 1.0, scales, real)
    take_parameters(args.bias, first, 0.0, shifts, real)
    for channel in range(size):
        mean, rstd = plain(means[channel]), plain(rstds[channel])
        center = rounded(mean, real)
        left, scale = mean - center, scales[channel] * rstd
        centers[channel], rest[channel], scales[channel] = center, left, scale
        shifts[channel] -= left * scale


@function
def set_slopes(args: Any, group: Any, first: Any, rest: Any, a: Any, b: Any, c: Any) -> None:
    """Write what `slopes` returns, of as many channels from `first` on as the arrays have."""
    start, size = 8 * (group * args.channels + first), rest.size
    rstds = numbers(args.rstd + start, size)
    given_a, given_b, given_c = (
        numbers(args.a + start, size),
        numbers(args.b + start, size),
        numbers(args.c + start, size),
    )
    for channel in range(size):
        a[channel], b[channel] = given_a[channel], given_b[channel]
        c[channel] = given_c[channel] - b[channel] * rest[channel] * rstds[channel]
