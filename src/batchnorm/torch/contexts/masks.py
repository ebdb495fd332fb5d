"""Reduces a mask for a model's input to the grids of its layers."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.errors import InputShapeError


class Masked:
    """The mask of a context, reduced once for all layers with the same grid.

    Args:
        mask: `[N, *S]` bool, True = the value counts.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._version = _version(mask)
        self._reduced: dict[tuple[int, ...], Tensor] = {}

    def of(self, input: Tensor) -> Tensor:
        """Return the mask for the input `[N, C, *S]` of a layer, `[N, *S]`."""
        sizes = (*input.shape[:1], *input.shape[2:])
        if torch.compiler.is_compiling():  # the compiler merges equal results by itself
            return reduced(self.mask, sizes)
        if _version(self.mask) != self._version:  # the mask was written to in place
            self._reduced.clear()
            self._version = _version(self.mask)
        if sizes not in self._reduced:
            self._reduced[sizes] = reduced(self.mask, sizes)
        return self._reduced[sizes]


def _version(tensor: Tensor) -> int:
    """Return torch's count of in-place writes; 0 where torch keeps none."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def reduced(mask: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return a mask for another grid: a position counts if any valid position of the mask falls in it.

    Position i of M covers [i L / M, (i + 1) L / M) of an axis with L positions. For M <= L it counts if any
    position that it touches does (adaptive max pooling), on a finer grid if the one at its start does
    (nearest). On a grid without positions, `[N]`, a sample counts if any of its positions does; a mask `[N]`
    holds for all positions of a sample.

    Args:
        mask: `[N, *S]` bool.
        sizes: (N, *S) of the layer's input.

    Raises:
        InputShapeError: another number of samples, or of axes.
    """
    if mask.shape[0] != sizes[0]:
        raise InputShapeError(
            f"batchnorm.mask: the mask is for {mask.shape[0]} samples (shape {list(mask.shape)}) and this "
            f"layer's input has {sizes[0]}: pass the layer a mask of its own (mask=)"
        )
    if len(sizes) == 1:
        return mask.flatten(1).any(1) if mask.dim() > 1 else mask
    if mask.dim() == 1:
        return mask.view(-1, *[1] * (len(sizes) - 1)).expand(sizes).contiguous()
    if mask.dim() != len(sizes):
        raise InputShapeError(
            f"batchnorm.mask: the mask has {mask.dim() - 1} axes of positions (shape {list(mask.shape)}) and "
            f"this layer's input {len(sizes) - 1}: pass the layer a mask of its own (mask=)"
        )
    for axis in range(1, mask.dim()):
        if mask.shape[axis] != sizes[axis]:
            mask = _resampled(mask, axis, sizes[axis])
    return mask


def _resampled(mask: Tensor, axis: int, size: int) -> Tensor:
    """Return the mask with `size` positions along one axis; none counts if the axis is empty."""
    length = mask.shape[axis]
    if length == 0:
        return mask.new_zeros([size if a == axis else s for a, s in enumerate(mask.shape)])
    places = torch.arange(size, device=mask.device)
    starts = places * length // size
    if size > length:
        return mask.index_select(axis, starts)
    ends = ((places + 1) * length + size - 1) // size
    before = torch.cat([torch.zeros_like(mask.narrow(axis, 0, 1), dtype=torch.long), mask.cumsum(axis)], axis)
    return before.index_select(axis, ends) > before.index_select(axis, starts)
