"""Lays out a batch for its moments: which axes they reduce, which values count, in which groups of samples.

Groups become an axis of their own, `[N, ...]` as `[G, size, ...]`, so that one reduction serves all of them.
Where the last group is smaller, or the number of samples is not known yet, zeros that no statistic counts
fill the batch up.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from keras import ops

from batchnorm.errors import InputShapeError

from .protocols import Tensor


class Parts(NamedTuple):
    """A batch in its groups.

    Attributes:
        x: `[G, size, ...]`; the batch itself, where it is one group.
        valid: bool, broadcasts against x, True = the value counts; None = all do.
        axis: the channel axis of x.
        axes: what moments reduce, in rising order; samples are on the first of them.
        is_split: whether x has the axis of groups.
        has_moved: whether channels were on the first axis, where samples are now.
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
        sizes = list(ops.shape(inputs))
        if self.has_moved:
            sizes[:2] = sizes[1], sizes[0]
        y = ops.reshape(y, (-1, *sizes[1:]))[: sizes[0]]
        return ops.moveaxis(y, 1, 0) if self.has_moved else y


def split(x: Tensor, valid: Tensor | None, axis: int, size: int | None) -> Parts:
    """Return x in groups of `size` samples, the last of which may be smaller; None = one group.

    Args:
        x: samples on the first axis, or on the second where channels are on the first.
        valid: broadcasts against x; None = all values count.
        axis: the channel axis, 0 or above.
        size: samples per group.
    """
    samples = x.shape[1 if axis == 0 else 0]
    if size is None or (isinstance(samples, int) and samples <= size):
        return Parts(x, valid, axis, tuple(dim for dim in range(len(x.shape)) if dim != axis))
    has_moved = axis == 0
    if has_moved:
        x, axis = ops.moveaxis(x, 0, 1), 1
        valid = None if valid is None else ops.moveaxis(valid, 0, 1)
    number, padding = ops.shape(x)[0], None
    if not isinstance(number, int):
        padding = ops.maximum(-(-number // size) * size, size) - number
    elif number % size:
        padding = -number % size
    if valid is None and padding is not None:
        valid = ops.ones([1] * len(x.shape), dtype="bool")
    if valid is not None:
        valid = _grouped(ops.broadcast_to(valid, (number, *ops.shape(valid)[1:])), padding, size)
    x = _grouped(x, padding, size)
    axes = tuple(dim for dim in range(1, len(x.shape)) if dim != axis + 1)
    return Parts(x, valid, axis + 1, axes, is_split=True, has_moved=has_moved)


def _grouped(values: Tensor, padding: Tensor | int | None, size: int) -> Tensor:
    """Return `[G, size, ...]`; `padding` is the number of samples that fill the last group up."""
    _, *rest = ops.shape(values)
    if padding is not None:
        values = ops.concatenate([values, ops.zeros((padding, *rest), dtype=values.dtype)], axis=0)
    return ops.reshape(values, (ops.shape(values)[0] // size, size, *rest))


def fewest(inputs: Tensor, axis: int, size: int | None) -> int:
    """Return the number of values per channel in the smallest group, where all lengths are known."""
    samples, *rest = (length for dim, length in enumerate(inputs.shape) if dim != axis)
    if size is not None and samples:
        samples = min(size, samples % size or size)
    return int(samples * math.prod(rest))


def valid_values(mask: Tensor | None, inputs: Tensor, axis: int, label: str) -> Tensor | None:
    """Return a bool tensor that broadcasts against `inputs`, True where the value counts; None = all do.

    A mask has one dimension less than the inputs. It is one of positions, `[N, *S]`: the inputs' shape
    without the channel axis. Where its shape rules that out, it is one of Keras's own making (`Masking`,
    `Embedding`), the inputs' shape without the last axis, and may then leave out whole channels of a sample.

    Args:
        mask: bool, or numbers of which 0 is False; dimensions of length 1 broadcast; None = no mask.
        inputs: what is normalized.
        axis: the channel axis, 0 or above.
        label: names the layer in errors. It goes into the message, as Keras raises errors of a call anew.

    Raises:
        InputShapeError: (a ValueError) the mask fits neither way.
    """
    if mask is None:
        return None
    shape, wanted = tuple(mask.shape), tuple(inputs.shape)
    if len(shape) != len(wanted) - 1:
        raise InputShapeError(
            f"{label}: The mask provided should be one dimension less than the inputs. "
            f"Received: mask.shape={shape}, inputs.shape={wanted}"
        )
    for missing in (axis, len(wanted) - 1):
        expected = wanted[:missing] + wanted[missing + 1 :]
        if all(have in (1, None, want) or want is None for have, want in zip(shape, expected, strict=True)):
            return ops.expand_dims(ops.cast(mask, "bool"), missing)
    raise InputShapeError(
        f"{label}: a mask of shape {shape} fits inputs of shape {wanted} with channels on axis {axis} "
        f"neither as positions, {wanted[:axis] + wanted[axis + 1 :]}, nor as all but the last axis, "
        f"{wanted[:-1]}"
    )
