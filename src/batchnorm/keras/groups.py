"""Groups of samples that follow each other, as an axis of their own: `[N, ...]` as `[G, size, ...]`.

So what is computed over a batch is computed over all groups at once. Where the last group is smaller, or the
number of samples is not known yet, the batch is filled up with zeros that no statistic counts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from keras import ops

Tensor = Any


class Parts(NamedTuple):
    """A batch as its moments are taken.

    Attributes:
        x: `[G, size, ...]`; the batch itself, where it is one group.
        valid: bool, broadcasts against x, True = the value counts; None = all do.
        axis: of the channels, in x.
        axes: what moments are taken over, in rising order; samples are on the first of them.
        is_split: whether x has the axis of groups.
        has_moved: whether channels were on the first axis, which is that of the samples now.
    """

    x: Tensor
    valid: Tensor | None
    axis: int
    axes: tuple[int, ...]
    is_split: bool = False
    has_moved: bool = False

    def per_channel(self, values: Tensor) -> Tensor:
        """Return `[C]`, in the dtype of x and shaped to broadcast against it."""
        shape = [1] * len(self.x.shape)
        shape[self.axis] = -1
        return ops.reshape(ops.cast(values, self.x.dtype), shape)

    def joined(self, y: Tensor, inputs: Tensor) -> Tensor:
        """Return y, of the shape of x, in the shape of the batch."""
        if not self.is_split:
            return y
        samples, *rest = _sizes(inputs, self.has_moved)
        y = ops.reshape(y, (-1, *rest))[:samples]
        return ops.moveaxis(y, 1, 0) if self.has_moved else y


def split(x: Tensor, valid: Tensor | None, axis: int, size: int | None) -> Parts:
    """Return x in groups of `size` samples, the last of which may be smaller; None = all are one.

    Args:
        x: samples on the first axis, or on the second where channels are on the first.
        valid: broadcasts against x; None = all values count.
        axis: of the channels, 0 or above.
        size: samples per group.
    """
    samples = x.shape[1 if axis == 0 else 0]
    if size is None or (isinstance(samples, int) and samples <= size):
        return Parts(x, valid, axis, tuple(dim for dim in range(len(x.shape)) if dim != axis))
    has_moved = axis == 0
    if has_moved:
        x, axis = ops.moveaxis(x, 0, 1), 1
        valid = None if valid is None else ops.moveaxis(valid, 0, 1)
    shape = ops.shape(x)
    number = samples if isinstance(samples, int) else shape[0]
    if not isinstance(samples, int) or samples % size:
        number, x, valid = _filled(x, valid, size)
    elif valid is not None:
        valid = _for_each_sample(valid, number)
    x = ops.reshape(x, (number // size, size, *shape[1:]))
    if valid is not None:
        valid = ops.reshape(valid, (number // size, size, *ops.shape(valid)[1:]))
    axes = tuple(dim for dim in range(1, len(x.shape)) if dim != axis + 1)
    return Parts(x, valid, axis + 1, axes, is_split=True, has_moved=has_moved)


def fewest(inputs: Tensor, axis: int, size: int | None) -> int:
    """Return the number of values per channel in the smallest group; where sizes are known."""
    samples, *rest = (length for dim, length in enumerate(inputs.shape) if dim != axis)
    if size is not None and samples:
        samples = min(size, samples % size or size)
    return int(samples * math.prod(rest))


def _filled(x: Tensor, valid: Tensor | None, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of samples, at least one and a multiple of `size`, and x and valid of so many."""
    samples, *rest = ops.shape(x)
    number = -(-samples // size) * size
    if not isinstance(samples, int):
        number = ops.maximum(number, size)
    x = ops.concatenate([x, ops.zeros((number - samples, *rest), dtype=x.dtype)], axis=0)
    if valid is None:
        valid = ops.ones((1, *[1] * len(rest)), dtype="bool")
    valid = _for_each_sample(valid, samples)
    none = ops.zeros((number - samples, *ops.shape(valid)[1:]), dtype="bool")
    return number, x, ops.concatenate([valid, none], axis=0)


def _for_each_sample(valid: Tensor, samples: Tensor) -> Tensor:
    return ops.broadcast_to(valid, (samples, *ops.shape(valid)[1:]))


def _sizes(inputs: Tensor, has_moved: bool) -> list[Any]:
    sizes = list(ops.shape(inputs))
    return [sizes[1], sizes[0], *sizes[2:]] if has_moved else sizes
