"""Several groups put together, behind a forward and a backward: the running statistics, dweight and dbias.

That is a launch of its own: calls of one group do not wait for it, nor compile it. A task takes a block of
channels of all groups. Whether a batch is skipped hangs on all channels: who ends the last task moves them.
"""

from __future__ import annotations

from typing import Any

from .access import take_number
from .kernel_args import numbers, set_parameter
from .running import is_spoiled, move
from .statistics import channels_of, unite
from .vector import function


@function
def pool(args: Any, block: Any, real: Any) -> None:  # noqa: ARG001
    """Put together the moments of a block of channels."""
    first, last = channels_of(args, block)
    if args.skipped and is_spoiled(args, first, last):
        args.spoiled = 1
    if args.sequential:
        _follow(args, first, last)
        return
    unite(
        args.groups,
        args.count,
        1,
        args.mean + 8 * first,
        args.m2 + 8 * first,
        args.channels,
        args.pooled_mean + 8 * first,
        args.pooled_m2 + 8 * first,
        last - first,
    )


@function
def _follow(args: Any, first: Any, last: Any) -> None:
    """Move statistics of 0 by each group in turn, as a batch of its own, to where pooled moments would be."""
    size, share, count = (
        args.groups * args.channels,
        args.momentum,
        numbers(args.count, args.groups),
    )
    mean, m2 = numbers(args.mean, size), numbers(args.m2, size)
    moved_mean, moved_var = (
        numbers(args.pooled_mean, args.channels),
        numbers(args.pooled_m2, args.channels),
    )
    for channel in range(first, last):
        moved_mean[channel], moved_var[channel] = 0.0, 0.0
    for group in range(args.groups):
        if count[group] >= 2:
            for channel in range(first, last):
                here = group * args.channels + channel
                var = m2[here] / (count[group] - 1)
                moved_mean[channel] = (1 - share) * moved_mean[channel] + share * mean[here]
                moved_var[channel] = (1 - share) * moved_var[channel] + share * var


@function
def move_running(args: Any, real: Any) -> None:
    """Move the running statistics by the pooled moments; or to where each group in turn has moved them."""
    if args.spoiled:
        take_number(args.skipped)
        return
    count, total, kept = numbers(args.count, args.groups), 0.0, 1.0
    for group in range(args.groups):
        total += count[group]
        if count[group] >= 2:
            kept *= 1 - args.momentum
        if args.batches and (args.sequential or group == 0):
            take_number(args.batches)
    if args.sequential:
        move(args, args.pooled_mean, args.pooled_m2, kept, 1.0, 1.0, real)
    elif total >= 2:
        move(
            args,
            args.pooled_mean,
            args.pooled_m2,
            1 - args.momentum,
            args.momentum,
            total - 1,
            real,
        )


@function
def set_parameters(args: Any, block: Any, real: Any) -> None:
    """Write dweight and dbias of a block of channels.

    The groups' sums, of which the coefficients have been computed, are added up in the first group's place.
    """
    first, last = channels_of(args, block)
    size, channels = args.groups * args.channels, args.channels
    sums, products = numbers(args.sum_dy, size), numbers(args.sum_dy_xhat, size)
    for group in range(1, args.groups):
        for channel in range(first, last):
            sums[channel] += sums[group * channels + channel]
            products[channel] += products[group * channels + channel]
    for channel in range(first, last):
        set_parameter(args.dweight, channel, products[channel], real)
        set_parameter(args.dbias, channel, sums[channel], real)
