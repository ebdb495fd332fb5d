"""Decides how a tensor is cut into tasks, by shape and layout alone: results do not depend on threads."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from batchnorm.kernels.layout import is_dense

SHORT = 256  # values of a channel side by side; with more, or a mask, a channel is a task of its own
_ROW = 1024  # columns of a row of several units, and of a block of short planes
_ROWS = 32  # rows that are worth more than wide ones
_BLOCK = 1024  # columns of a block otherwise: a multiple of a vector
_CACHED = 2**17  # values that stay in a core's cache
_NARROW = 128  # columns of a block that are worth a task of their own
_SPAN = 2**16  # values of a task of several groups or channels, at most
_TASKS = 16  # enough for the threads of most machines, and for an even share of work
_PART, _PARTS = 2**17, 32  # values of a part at least, and number of parts at most
_PART_GIVEN = 2**15  # where statistics are given, and no part has moments that must be merged


class Partition(NamedTuple):
    """The tasks of a call; kernel_args.py says what the numbers mean.

    Attributes:
        is_dense: whether the tensor is laid out as one of the two that there are kernels for.
        family: `planes` or `rows`.
        tasks: their number.
    """

    is_dense: bool
    family: str
    channels: int
    positions: int
    groups: int
    units: int
    group_units: int
    parts: int
    columns: int
    block: int
    span: int
    tasks: int


@functools.lru_cache(maxsize=4096)
def partition(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    masked: bool,
    group_size: int | None,
    given: bool = False,
) -> Partition:
    """Returns the tasks for a tensor `[N, C, *S]` that is not empty.

    Args:
        shape, stride: of the tensor.
        masked: some positions do not count.
        group_size: samples per statistics group; None = all.
        given: whether statistics are given, so that nothing is summed over a channel.
    """
    axes = range(len(shape))
    contiguous = is_dense(shape, stride, axes)
    channels_last = not contiguous and is_dense(shape, stride, (0, *axes[2:], 1))
    dense = contiguous or channels_last
    samples, channels, positions = shape[0], shape[1], math.prod(shape[2:])
    group = samples if group_size is None else min(group_size, samples)
    groups = math.ceil(samples / group)
    if not channels_last and positions > 1 and (positions >= SHORT or masked):
        parts = _parts(channels * groups, group * positions, _PART)
        spread = channels if groups == 1 else max(_TASKS // groups, channels * group * positions // _SPAN)
        block = math.ceil(channels / max(1, min(channels, spread)))
        tasks = parts * groups * math.ceil(channels / block)
        return Partition(
            dense, "planes", channels, positions, groups, samples, group, parts, 0, block, 1, tasks
        )
    narrow = 0
    if channels_last or positions == 1:
        units, group, positions = samples * positions, group * positions, 1
        narrow = 0 if given else _CACHED // group // 16 * 16
        if narrow >= _NARROW and channels >= _NARROW:  # a block is read again from the cache
            columns, block = channels, min(narrow, max(_NARROW, -(-channels // 64) * 16))
        else:
            fold = 1 if masked else max(1, min(group // _ROWS, _ROW // channels))
            columns, block = channels * fold, _BLOCK
    else:
        units, columns, block = samples, channels * positions, _columns(positions)
    blocks = math.ceil(columns / block)
    values = group * channels * positions // blocks
    parts = 1 if block <= narrow else _parts(blocks * groups, values, _PART_GIVEN if given else _PART)
    span = 1 if parts > 1 else max(1, min(groups * blocks // _TASKS, _SPAN // (values + 1)))
    tasks = parts * math.ceil(groups / span) * blocks
    return Partition(
        dense, "rows", channels, positions, groups, units, group, parts, columns, block, span, tasks
    )


def _columns(positions: int) -> int:
    """Returns the columns of a block of short planes: whole ones, and whole vectors of columns."""
    planes = 16 // math.gcd(16, positions)
    return max(1, _ROW // (planes * positions)) * planes * positions


def _parts(tasks: int, values: int, least: int) -> int:
    """Returns the number of parts, of `least` values or more, into which each of the tasks is cut."""
    return 1 if tasks >= _TASKS else max(1, min(_PARTS // tasks, values // least))
