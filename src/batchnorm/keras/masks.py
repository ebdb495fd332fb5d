"""What a mask says about each value: channels-first too, which the stock layer gets wrong."""

from __future__ import annotations

from typing import Any

from keras import ops

from batchnorm.errors import InputShapeError

Tensor = Any
Shape = tuple[int | None, ...]


def valid_values(mask: Tensor, inputs: Tensor, axis: int) -> Tensor:
    """Return a bool tensor that broadcasts against `inputs`, True where the value counts.

    A mask has one dimension less than the inputs. It is one of positions, `[N, *S]`: the inputs' shape
    without the channel axis. Where its shape rules that out, it is one of Keras's own making (`Masking`,
    `Embedding`), the inputs' shape without the last axis, and may then leave out whole channels of a sample.

    Args:
        mask: bool, or numbers of which 0 is False; dimensions of length 1 broadcast.
        inputs: what is normalized.
        axis: the channel axis, 0 or above.

    Raises:
        InputShapeError: (a ValueError) the mask fits neither way.
    """
    shape, wanted = tuple(mask.shape), tuple(inputs.shape)
    if len(shape) != len(wanted) - 1:
        raise InputShapeError(
            "The mask provided should be one dimension less than the inputs. "
            f"Received: mask.shape={shape}, inputs.shape={wanted}"
        )
    for missing in (axis, len(wanted) - 1):
        if _fits(shape, wanted[:missing] + wanted[missing + 1 :]):
            return ops.expand_dims(ops.cast(mask, "bool"), missing)
    raise InputShapeError(
        f"a mask of shape {shape} fits inputs of shape {wanted} with channels on axis {axis} neither as "
        f"positions, {wanted[:axis] + wanted[axis + 1 :]}, nor as all but the last axis, {wanted[:-1]}"
    )


def _fits(shape: Shape, wanted: Shape) -> bool:
    return all(have in (1, None, want) or want is None for have, want in zip(shape, wanted, strict=True))
