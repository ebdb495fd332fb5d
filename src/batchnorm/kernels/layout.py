"""Tells how values lie in memory, for engines that read it by address."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(shape: tuple[int, ...], stride: tuple[int, ...], axes: Sequence[int]) -> bool:
    """Returns whether values lie side by side, in the order of these axes: the last varies fastest."""
    step = 1
    for axis in reversed(axes):
        if shape[axis] > 1 and stride[axis] != step:
            return False
        step *= shape[axis]
    return True


def is_alike(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors of one shape have the same dtype and layout."""
    return a.dtype == b.dtype and a.stride() == b.stride()


def laid_out_as(like: Tensor, values: Tensor) -> Tensor:
    """Returns values in the dtype and layout that a fresh tensor like `like` has."""
    wanted = torch.empty_like(like)
    return values if is_alike(values, wanted) else wanted.copy_(values)


def shows_values(tensor: Tensor) -> bool:
    """Returns whether a tensor's memory holds its values.

    That of a view with the neg bit holds their negatives, and a ZeroTensor has no memory.
    """
    return not (tensor.is_neg() or tensor._is_zerotensor())


def in_memory(tensor: Tensor) -> Tensor:
    """Returns a tensor whose memory holds its values: this one, or a copy."""
    return tensor if shows_values(tensor) else tensor.clone()
