"""Updates running statistics, in the thread that finishes a forward's last task; and reads them.

With a batch of n values and var = m2 / (n - 1):

    running = (1 - momentum) * running + momentum * batch

Fewer than two values have no variance, and move nothing; `batches` grows all the same. Where `skipped` is
given, a batch whose mean or m2 is not finite, in any channel, adds 1 to `skipped` and changes nothing else.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .access import take_number
from .kernel_args import numbers, parameter, set_parameter
from .vector import function


@function
def move_running(args: Any, real: Any) -> None:
    """Updates the running statistics by the moments of a call's only group."""
    if not args.moves:
        return
    if args.skipped and is_spoiled(args, 0, args.channels):
        take_number(args.skipped)
        return
    if args.batches:
        take_number(args.batches)
    count = numbers(args.count, 1)[0]
    if count >= 2:
        move(args, args.mean, args.m2, 1 - args.momentum, args.momentum, count - 1, real)


@function
def is_spoiled(args: Any, first: Any, last: Any) -> Any:
    """Returns whether any group has a mean or m2 that is not finite, in channels `first` to `last`."""
    size, finite = args.groups * args.channels, True
    mean, m2 = numbers(args.mean, size), numbers(args.m2, size)
    for start in range(0, size, args.channels):
        for here in range(start + first, start + last):
            finite = finite and math.isfinite(mean[here]) and math.isfinite(m2[here])
    return not finite


@function
def move(args: Any, mean: Any, m2: Any, kept: Any, share: Any, divisor: Any, real: Any) -> None:
    """Writes running = kept * running + share * batch, with the batch's mean and var = m2 / divisor.

    Args:
        args: the call's arguments.
        mean, m2: addresses of the batch's moments, `[C]`.
        kept, share, divisor: numbers of the equation.
        real: dtype of the arithmetic.
    """
    means, m2s = numbers(mean, args.channels), numbers(m2, args.channels)
    for channel in range(args.channels):
        if args.running_mean:
            old = parameter(args.running_mean, channel, 0.0, real)
            set_parameter(args.running_mean, channel, kept * old + share * means[channel], real)
        if args.running_var:
            old = parameter(args.running_var, channel, 0.0, real)
            set_parameter(args.running_var, channel, kept * old + share * (m2s[channel] / divisor), real)


@function
def move_nothing(args: Any, real: Any) -> None:
    """Does nothing: a backward updates no running statistics."""


@function
def take_running(args: Any, real: Any) -> None:
    """Writes mean and rstd of the running statistics."""
    mean, rstd = numbers(args.mean, args.channels), numbers(args.rstd, args.channels)
    for channel in range(args.channels):
        mean[channel] = parameter(args.running_mean, channel, 0.0, real)
        rstd[channel] = 1.0 / np.sqrt(parameter(args.running_var, channel, 1.0, real) + args.eps)
