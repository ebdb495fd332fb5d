"""Merges parts and groups per channel, in float64, and computes parameters from moments and sums.

Channels are `[1, K]`, or one number. Only numbers per channel are float64: most GPUs have few units for it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def at_least_one(count):
    """Returns counts to divide by: 1 in place of 0."""
    return tl.where(count > 0, count, 1.0)


@triton.jit
def united(count, mean, m2):
    """Returns count, mean and m2 of the union of parts `[parts, K]`; a part without values has a count of 0.

    Chan's formula for many parts is m2 = Σ m2ₚ + Σ nₚ (meanₚ - mean)². The mean is corrected by its rounding
    error.
    """
    n = tl.sum(count, 0, keep_dims=True)
    whole = at_least_one(n)
    rough = tl.sum(count * mean, 0, keep_dims=True) / whole
    apart = tl.where(count > 0, mean - rough, 0.0)
    more = tl.sum(count * apart, 0, keep_dims=True) / whole
    squares = tl.sum(m2 + count * apart * apart, 0, keep_dims=True)
    return n, rough + more, positive(squares - n * more * more)


@triton.jit
def merged(count, mean, m2, more, other_mean, other_m2):
    """Returns count, mean and m2 of a union of two, by Chan's formula; either may have no values."""
    n = count + more
    share = more / at_least_one(n)
    apart = tl.where((count > 0) & (more > 0), other_mean - mean, 0.0)
    start = tl.where(count > 0, mean, other_mean)
    return n, start + apart * share, m2 + other_m2 + apart * apart * (count * share)


@triton.jit
def positive(m2):
    """Returns m2, or 0 where rounding made it negative; NaN stays."""
    return tl.where(m2 < 0.0, 0.0, m2)


@triton.jit
def rstd_of(count, m2, EPS: tl.constexpr):
    """Returns 1 / sqrt(var + eps)."""
    return 1.0 / tl.sqrt(m2 / at_least_one(count) + EPS)


@triton.jit
def parameter(values, channel, is_channel, default: tl.constexpr):
    """Returns weight or bias of channels; `default` if `values` is None."""
    if values is None:
        found = default + tl.zeros_like(channel).to(tl.float64)
    else:
        found = tl.load(values + channel, mask=is_channel, other=default).to(tl.float64)
    return found


@triton.jit
def rest_of(mean, REAL: tl.constexpr):
    """Returns the mean minus the mean rounded to the dtype of the arithmetic."""
    return mean - mean.to(REAL).to(tl.float64)


@triton.jit
def affine_of(mean, rstd, weight, bias, channel, is_channel, REAL: tl.constexpr):
    """Returns center, scale and shift of z = (x - center) * scale + shift, and the mean minus the center.

    The center is the mean, rounded: x - center is then exact where it matters.
    """
    center = mean.to(REAL)
    rest = rest_of(mean, REAL)
    scale = parameter(weight, channel, is_channel, 1.0) * rstd
    shift = tl.fma(-rest, scale, parameter(bias, channel, is_channel, 0.0))
    return center, scale.to(REAL), shift.to(REAL), rest


@triton.jit
def load_affine(mean, rstd, weight, bias, program, REAL: tl.constexpr):
    """Returns (center, scale, shift), the mean minus the center, and rstd, of statistics `[G, C]`."""
    group, channel, _, shape = program
    channels, _, _, _ = shape
    is_channel = channel < channels
    place = group * channels + channel
    found_rstd = tl.load(rstd + place, mask=is_channel, other=0.0)
    found_mean = tl.load(mean + place, mask=is_channel, other=0.0)
    center, scale, shift, rest = affine_of(found_mean, found_rstd, weight, bias, channel, is_channel, REAL)
    return (center, scale, shift), rest, found_rstd


@triton.jit
def coefficients(count, sum_dy, sum_dy_xhat, rstd, weight, channel, is_channel, GIVEN: tl.constexpr):
    """Returns a, b and c of dx = a dy' + b x̂ + c; of constant (given) statistics, b = c = 0."""
    a = parameter(weight, channel, is_channel, 1.0) * rstd
    if GIVEN:  # 0 times a sum that is not finite would be NaN, for all of the channel
        b = tl.zeros_like(a)
        c = tl.zeros_like(a)
    else:
        share = -a / at_least_one(count)
        b = share * sum_dy_xhat
        c = share * sum_dy
    return a, b, c


@triton.jit
def slopes(given, rest, rstd, REAL: tl.constexpr):
    """Returns a, b, c and rstd of dx = a dy' + b (x - center) rstd + c; given a, b, c go with x̂."""
    a, b, c = given
    return a.to(REAL), b.to(REAL), tl.fma(-b * rest, rstd, c).to(REAL), rstd.to(REAL)


@triton.jit
def move(running_mean, running_var, channel, can_move, kept, share, mean, var):
    """Writes running = kept * running + share * batch, where there are running statistics."""
    if running_mean is not None:
        old = tl.load(running_mean + channel, mask=can_move, other=0.0).to(tl.float64)
        tl.store(running_mean + channel, kept * old + share * mean, mask=can_move)
    if running_var is not None:
        old = tl.load(running_var + channel, mask=can_move, other=0.0).to(tl.float64)
        tl.store(running_var + channel, kept * old + share * var, mask=can_move)


@triton.jit
def move_by_batch(running_mean, running_var, batches, channel, is_channel, momentum, found):
    """Moves running statistics by a batch, unless it has fewer than two values; adds 1 to `batches`."""
    count, mean, m2 = found
    var = m2 / at_least_one(count - 1.0)
    move(running_mean, running_var, channel, is_channel & (count >= 2.0), 1.0 - momentum, momentum, mean, var)
    if batches is not None:
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)


@triton.jit
def set_moments(count, mean, m2, rstd, found, group, channels, channel, EPS: tl.constexpr):
    """Writes count `[G]`, and mean, m2 and rstd `[G, C]`, of a group; returns rstd.

    Args:
        count, mean, m2, rstd: pointers.
        found: (count, mean, m2) of the channels.
        group, channels, channel: the group, C, and the channels.
    """
    found_count, found_mean, found_m2 = found
    is_channel = channel < channels
    found_rstd = rstd_of(found_count, found_m2, EPS)
    place = group * channels + channel
    tl.store(count + group + tl.zeros_like(channel), found_count, mask=channel == 0)
    tl.store(mean + place, found_mean, mask=is_channel)
    tl.store(m2 + place, found_m2, mask=is_channel)
    tl.store(rstd + place, found_rstd, mask=is_channel)
    return found_rstd
