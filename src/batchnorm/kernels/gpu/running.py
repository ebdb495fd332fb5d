"""Updates running statistics in a launch of its own, for several groups or batches to skip; and reads them.

With the moments of all groups together, or of each in turn, and var = m2 / (n - 1):

    running = (1 - momentum) * running + momentum * batch

Whether a batch is skipped depends on all of its channels: each program reads all of them, and waits for no
other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .statistics import at_least_one, merged, move, united
from .tiles import NUMBERS

_LOOK = tl.constexpr(1024)  # channels that are checked at a time


@triton.jit
def _is_spoiled(mean, m2, size):
    """Returns a number above 0 if any of `size` means and m2 is not finite, else 0."""
    bad = tl.zeros([_LOOK], tl.int32)
    for start in range(0, size, _LOOK):
        at = start + tl.arange(0, _LOOK)
        a = tl.load(mean + at, mask=at < size, other=0.0)
        b = tl.load(m2 + at, mask=at < size, other=0.0)
        bad += tl.where((a - a == 0.0) & (b - b == 0.0), 0, 1)  # inf - inf is NaN
    return tl.max(bad, 0)


@triton.jit(do_not_specialize=NUMBERS)
def move_running(
    count,
    mean,
    m2,
    running_mean,
    running_var,
    batches,
    skipped,
    momentum: tl.float64,
    channels,
    groups,
    size,
    SEQUENTIAL: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Updates the running statistics of some channels by the moments of all groups."""
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]).to(tl.int64)
    is_channel = channel < channels
    spoiled = tl.full([], 0, tl.int32)
    if skipped is not None:
        spoiled = _is_spoiled(mean, m2, size)
    is_fine = is_channel & (tl.zeros_like(channel) + spoiled == 0)
    grown = 1
    if SEQUENTIAL:
        grown = groups
        kept = tl.full([1, CHANNELS], 1.0, tl.float64)
        moved_mean = tl.zeros([1, CHANNELS], tl.float64)
        moved_var = tl.zeros([1, CHANNELS], tl.float64)
        for group in range(groups):
            n = tl.load(count + group)
            place = group * channels + channel
            share = (n >= 2.0).to(tl.float64) * momentum
            means = tl.load(mean + place, mask=is_channel, other=0.0)
            var = tl.load(m2 + place, mask=is_channel, other=0.0) / at_least_one(n - 1.0)
            moved_mean = tl.where(n >= 2.0, (1.0 - share) * moved_mean + share * means, moved_mean)
            moved_var = tl.where(n >= 2.0, (1.0 - share) * moved_var + share * var, moved_var)
            kept = kept * (1.0 - share)
        move(running_mean, running_var, channel, is_fine & (kept < 1.0), kept, 1.0, moved_mean, moved_var)
    else:
        n = tl.zeros([1, CHANNELS], tl.float64)
        pooled_mean = tl.zeros([1, CHANNELS], tl.float64)
        pooled_m2 = tl.zeros([1, CHANNELS], tl.float64)
        for start in range(0, groups, GROUPS):
            group = start + tl.arange(0, GROUPS)[:, None].to(tl.int64)
            inside = (group < groups) & is_channel
            place = group * channels + channel
            more = tl.load(count + group + tl.zeros_like(channel), mask=inside, other=0.0)
            means = tl.load(mean + place, mask=inside, other=0.0)
            squares = tl.load(m2 + place, mask=inside, other=0.0)
            other, other_mean, other_m2 = united(more, means, squares)
            n, pooled_mean, pooled_m2 = merged(n, pooled_mean, pooled_m2, other, other_mean, other_m2)
        can_move = is_fine & (n >= 2.0)
        var = pooled_m2 / at_least_one(n - 1.0)
        move(running_mean, running_var, channel, can_move, 1.0 - momentum, momentum, pooled_mean, var)
    if tl.program_id(0) == 0:
        if batches is not None:
            tl.store(batches, tl.load(batches) + tl.where(spoiled == 0, grown, 0))
        if skipped is not None:
            tl.store(skipped, tl.load(skipped) + tl.where(spoiled == 0, 0, 1))


@triton.jit
def take_running(running_mean, running_var, mean, rstd, eps: tl.float64, channels, CHANNELS: tl.constexpr):
    """Writes mean and rstd of the running statistics."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    var = tl.load(running_var + channel, mask=is_channel, other=1.0).to(tl.float64)
    tl.store(mean + channel, tl.load(running_mean + channel, mask=is_channel, other=0.0), mask=is_channel)
    tl.store(rstd + channel, 1.0 / tl.sqrt(var + eps), mask=is_channel)
