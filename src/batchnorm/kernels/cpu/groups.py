"""Merges groups: moments for the running statistics, and the gradient's sums for dweight and dbias.

It is a launch of its own, so that calls with one group neither run nor compile it. A task takes a block of
channels of all groups. Whether a batch is skipped depends on all channels, so the thread that finishes the
last task updates the running statistics.
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
    """Merges the moments of a block of channels over all groups."""
    first, last = channels_of(args, block)
    if args.skipped and is_spoiled(args, first, last):
        args.spoiled = 1
    if args.sequential:
        _follow(args, first, last)
        return
    mean, m2 = args.mean + 8 * first, args.m2 + 8 * first
    pooled_mean, pooled_m2 = args.pooled_mean + 8 * first, args.pooled_m2 + 8 * first
    unite(args.groups, args.count, 1, mean, m2, args.channels, pooled_mean, pooled_m2, last - first)


@function
def _follow(args: Any, first: Any, last: Any) -> None:
    """Writes, as pooled moments, statistics that start at 0 and are moved by one group after the other."""
    size, share = args.groups * args.channels, args.momentum
    count = numbers(args.count, args.groups)
    mean, m2 = numbers(args.mean, size), numbers(args.m2, size)
    moved_mean, moved_var = numbers(args.pooled_mean, args.channels), numbers(args.pooled_m2, args.channels)
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
    """Updates the running statistics by the pooled moments, or by each group in turn if `sequential`."""
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
        kept, share = 1 - args.momentum, args.momentum
        move(args, args.pooled_mean, args.pooled_m2, kept, share, total - 1, real)


@function
def set_parameters(args: Any, block: Any, real: Any) -> None:
    """Writes dweight and dbias of a block of channels.

    The groups' sums are added up in place of the first group's, since no coefficient depends on these any
    more.
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
