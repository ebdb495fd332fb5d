"""Per channel, in float64: moments of a union of parts, and the parameters that follow from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .packet import numbers, parameter
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
def rounded(value: Any, real: Any) -> Any:
    """Return a number rounded to the dtype of the arithmetic."""
    return np.float64(real(value))


@function
def finish_moments(packet: Any, group: Any, channel: Any) -> None:
    """Merge the parts of a channel's moments into the first, and write rstd = 1 / sqrt(m2 / count + eps)."""
    size = packet.groups * packet.channels
    counts = numbers(packet.count, packet.parts * size)
    means, m2s = numbers(packet.mean, packet.parts * size), numbers(packet.m2, packet.parts * size)
    here = group * packet.channels + channel
    for place in range(here + size, packet.parts * size, size):
        if counts[place] > 0:
            means[here], m2s[here] = merged(
                counts[here], means[here], m2s[here], counts[place], means[place], m2s[place]
            )
            counts[here] += counts[place]
    numbers(packet.rstd, size)[here] = 1.0 / np.sqrt(m2s[here] / max(counts[here], 1.0) + packet.eps)


@function
def finish_sums(packet: Any, group: Any, channel: Any, real: Any) -> None:
    """Add up the parts of a channel's sums, and write the coefficients of dx = a dy' + b x̂ + c.

    Of the batch's own statistics, with n = count: a = weight rstd, b = -a Σ(dy' x̂)/n, c = -a Σdy'/n; of
    constant ones, b = c = 0.
    """
    size = packet.groups * packet.channels
    counts = numbers(packet.count, packet.parts * size)
    sums, products = (
        numbers(packet.sum_dy, packet.parts * size),
        numbers(packet.sum_dy_xhat, packet.parts * size),
    )
    here = group * packet.channels + channel
    for place in range(here + size, packet.parts * size, size):
        counts[here] += counts[place]
        sums[here] += sums[place]
        products[here] += products[place]
    a = parameter(packet.weight, channel, 1.0, real) * numbers(packet.rstd, size)[here]
    share = 0.0 if packet.constant else -a / max(counts[here], 1.0)
    numbers(packet.a, size)[here] = a
    numbers(packet.b, size)[here] = share * products[here]
    numbers(packet.c, size)[here] = share * sums[here]


@function
def affine(packet: Any, group: Any, channel: Any, real: Any) -> Any:
    """Return center, scale and shift of z = (x - center) * scale + shift, and what rounding left of the mean.

    The center is the mean, rounded: x - center is then exact where it matters.
    """
    size = packet.groups * packet.channels
    here = group * packet.channels + channel
    mean, rstd = numbers(packet.mean, size)[here], numbers(packet.rstd, size)[here]
    center = rounded(mean, real)
    rest = mean - center
    scale = parameter(packet.weight, channel, 1.0, real) * rstd
    return center, scale, parameter(packet.bias, channel, 0.0, real) - rest * scale, rest


@function
def slopes(packet: Any, group: Any, channel: Any, rest: Any) -> Any:
    """Return rstd, a, b and c of dx = a dy' + b (x - center) rstd + c."""
    size = packet.groups * packet.channels
    here = group * packet.channels + channel
    rstd, b = numbers(packet.rstd, size)[here], numbers(packet.b, size)[here]
    return rstd, numbers(packet.a, size)[here], b, numbers(packet.c, size)[here] - b * rest * rstd


CHANNELS = 256  # of a task that only merges parts


@function
def merge_moments(packet: Any, index: Any, kind: Any, real: Any, how: Any) -> None:  # noqa: ARG001
    """Merge the parts of the moments of task `index`'s channels, counted over all groups."""
    for here in range(index * CHANNELS, min(packet.groups * packet.channels, (index + 1) * CHANNELS)):
        finish_moments(packet, here // packet.channels, here % packet.channels)


@function
def merge_sums(packet: Any, index: Any, kind: Any, real: Any, how: Any) -> None:  # noqa: ARG001
    """Add up the parts of the sums of task `index`'s channels, counted over all groups."""
    for here in range(index * CHANNELS, min(packet.groups * packet.channels, (index + 1) * CHANNELS)):
        finish_sums(packet, here // packet.channels, here % packet.channels, real)
