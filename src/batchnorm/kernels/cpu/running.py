"""Running statistics: moved by whoever ends the last task of a forward; or taken to normalize by.

With a batch of n values and var = m2 / (n - 1):

    running = (1 - momentum) * running + momentum * batch

Fewer than two values have no variance, and move nothing; the batch counts all the same. Where `skipped` is
given, a batch with a mean or m2 that is not finite is counted there and nowhere else, whichever its channel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .access import take_number
from .packet import numbers, parameter, set_parameter
from .vector import function


@function
def move_running(packet: Any, real: Any) -> None:
    """Move the running statistics by the moments of a call's one group."""
    if not packet.moves:
        return
    if packet.skipped and is_spoiled(packet, 0, packet.channels):
        take_number(packet.skipped)
        return
    if packet.batches:
        take_number(packet.batches)
    count = numbers(packet.count, 1)[0]
    if count >= 2:
        move(packet, packet.mean, packet.m2, 1 - packet.momentum, packet.momentum, count - 1, real)


@function
def is_spoiled(packet: Any, first: Any, last: Any) -> Any:
    """Whether a mean or m2 of channels `first` to `last` is not finite, in any group."""
    size, finite = packet.groups * packet.channels, True
    mean, m2 = numbers(packet.mean, size), numbers(packet.m2, size)
    for start in range(0, size, packet.channels):
        for here in range(start + first, start + last):
            finite = finite and math.isfinite(mean[here]) and math.isfinite(m2[here])
    return not finite


@function
def move(packet: Any, mean: Any, m2: Any, kept: Any, share: Any, divisor: Any, real: Any) -> None:
    """Write running = kept * running + share * batch, by the batch's mean and var = m2 / divisor.

    Args:
        packet: the call.
        mean, m2: addresses, `[C]`.
        kept, share, divisor: see above.
        real: of the arithmetic.
    """
    means, m2s = numbers(mean, packet.channels), numbers(m2, packet.channels)
    for channel in range(packet.channels):
        if packet.running_mean:
            old = parameter(packet.running_mean, channel, 0.0, real)
            set_parameter(packet.running_mean, channel, kept * old + share * means[channel], real)
        if packet.running_var:
            old = parameter(packet.running_var, channel, 0.0, real)
            set_parameter(packet.running_var, channel, kept * old + share * (m2s[channel] / divisor), real)


@function
def move_nothing(packet: Any, real: Any) -> None:
    """Do nothing: a backward moves no running statistics."""


@function
def take_running(packet: Any, real: Any) -> None:
    """Write mean and rstd by the running statistics."""
    mean, rstd = numbers(packet.mean, packet.channels), numbers(packet.rstd, packet.channels)
    for channel in range(packet.channels):
        mean[channel] = parameter(packet.running_mean, channel, 0.0, real)
        rstd[channel] = 1.0 / np.sqrt(parameter(packet.running_var, channel, 1.0, real) + packet.eps)
