"""Several groups put together, behind a forward and a backward: the running statistics, dweight and dbias.

That is a launch of its own: calls of one group do not wait for it, nor compile it. A task takes a block of
channels of all groups. Whether a batch is skipped hangs on all channels: who ends the last task moves them.
"""

from __future__ import annotations

from typing import Any

from .access import take_number
from .packet import numbers, set_parameter
from .running import is_spoiled, move
from .statistics import channels_of, unite
from .vector import function


@function
def pool(packet: Any, block: Any, real: Any) -> None:  # noqa: ARG001
    """Put together the moments of a block of channels."""
    first, last = channels_of(packet, block)
    if packet.skipped and is_spoiled(packet, first, last):
        packet.spoiled = 1
    if packet.sequential:
        _follow(packet, first, last)
        return
    unite(
        packet.groups,
        packet.count,
        1,
        packet.mean + 8 * first,
        packet.m2 + 8 * first,
        packet.channels,
        packet.pooled_mean + 8 * first,
        packet.pooled_m2 + 8 * first,
        last - first,
    )


@function
def _follow(packet: Any, first: Any, last: Any) -> None:
    """Move statistics of 0 by each group in turn, as a batch of its own, to where pooled moments would be."""
    size, share, count = (
        packet.groups * packet.channels,
        packet.momentum,
        numbers(packet.count, packet.groups),
    )
    mean, m2 = numbers(packet.mean, size), numbers(packet.m2, size)
    moved_mean, moved_var = (
        numbers(packet.pooled_mean, packet.channels),
        numbers(packet.pooled_m2, packet.channels),
    )
    for channel in range(first, last):
        moved_mean[channel], moved_var[channel] = 0.0, 0.0
    for group in range(packet.groups):
        if count[group] >= 2:
            for channel in range(first, last):
                here = group * packet.channels + channel
                var = m2[here] / (count[group] - 1)
                moved_mean[channel] = (1 - share) * moved_mean[channel] + share * mean[here]
                moved_var[channel] = (1 - share) * moved_var[channel] + share * var


@function
def move_running(packet: Any, real: Any) -> None:
    """Move the running statistics by the pooled moments; or to where each group in turn has moved them."""
    if packet.spoiled:
        take_number(packet.skipped)
        return
    count, total, kept = numbers(packet.count, packet.groups), 0.0, 1.0
    for group in range(packet.groups):
        total += count[group]
        if count[group] >= 2:
            kept *= 1 - packet.momentum
        if packet.batches and (packet.sequential or group == 0):
            take_number(packet.batches)
    if packet.sequential:
        move(packet, packet.pooled_mean, packet.pooled_m2, kept, 1.0, 1.0, real)
    elif total >= 2:
        move(
            packet,
            packet.pooled_mean,
            packet.pooled_m2,
            1 - packet.momentum,
            packet.momentum,
            total - 1,
            real,
        )


@function
def set_parameters(packet: Any, block: Any, real: Any) -> None:
    """Write dweight and dbias of a block of channels.

    The groups' sums, of which the coefficients have been computed, are added up in the first group's place.
    """
    first, last = channels_of(packet, block)
    size, channels = packet.groups * packet.channels, packet.channels
    sums, products = numbers(packet.sum_dy, size), numbers(packet.sum_dy_xhat, size)
    for group in range(1, packet.groups):
        for channel in range(first, last):
            sums[channel] += sums[group * channels + channel]
            products[channel] += products[group * channels + channel]
    for channel in range(first, last):
        set_parameter(packet.dweight, channel, products[channel], real)
        set_parameter(packet.dbias, channel, sums[channel], real)
