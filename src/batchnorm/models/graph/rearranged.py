"""Tells what an operator does with the axes of its input, and how it joins several inputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .dispatch_observer import tensors_in
from .flow import Axes, Concatenation, Sum

_RESHAPES = ("aten::view", "aten::_unsafe_view", "aten::_reshape_alias", "aten::unsqueeze", "aten::squeeze")
_ADDITIONS = ("aten::add", "aten::add_", "aten::sub", "aten::sub_")
# Each output is a weighted average of inputs, with weights that sum to one.
_AVERAGES = (
    "aten::avg_pool", "aten::_adaptive_avg_pool", "aten::adaptive_avg_pool", "aten::upsample_nearest",
    "aten::upsample_linear", "aten::upsample_bilinear", "aten::upsample_bicubic", "aten::upsample_trilinear",
    "aten::_upsample_nearest_exact", "aten::_upsample_bilinear", "aten::_upsample_bicubic",
)  # fmt: skip
_SPATIAL = {"1d": 1, "2d": 2, "3d": 3}


def axes_of(func: Any, args: tuple[Any, ...], result: Any) -> Axes:
    """Return which axis of its input each axis of a result is.

    None unless the result is the input, laid out anew, or averages of it along axes that are None in it.
    """
    name = func._schema.name
    if not args or not isinstance(args[0], Tensor) or not isinstance(result, Tensor):
        return None
    old, new = tuple(args[0].shape), tuple(result.shape)
    rank = len(old)
    if args[0].dtype != result.dtype:  # the same bits read as other numbers
        return None
    if name in _RESHAPES:
        return tuple(_same_place(old, new, axis) for axis in range(len(new)))
    if name == "aten::permute":
        return tuple(axis % rank for axis in args[1])
    if name in ("aten::transpose", "aten::t"):
        order = list(range(rank))
        one, other = (args[1] % rank, args[2] % rank) if name == "aten::transpose" else (0, rank - 1)
        order[one], order[other] = order[other], order[one]
        return tuple(order)
    if name == "aten::slice":
        cut = (args[1] if len(args) > 1 else 0) % rank
        return tuple(None if axis == cut and old != new else axis for axis in range(rank))
    if name in _ADDITIONS and len(args) > 1 and isinstance(args[1], (int, float)) and args[1] == 0:
        return "same"
    if name == "aten::clone":
        return tuple(range(rank))
    return _averaged(name, args, rank, len(new))


def _averaged(name: str, args: tuple[Any, ...], rank: int, new_rank: int) -> Axes:
    """Return the axes that an operator keeps while it takes averages along all others."""
    if name == "aten::mean" and len(args) > 1 and args[1]:
        gone = {axis % rank for axis in args[1]}
        kept = tuple(None if axis in gone else axis for axis in range(rank))
        return kept if new_rank == rank else tuple(axis for axis in kept if axis is not None)
    counts_zeros = "avg_pool" in name and "adaptive" not in name and not _is_average_of_data(args)
    if counts_zeros or not name.startswith(_AVERAGES):
        return None
    spatial = _SPATIAL.get(name.removesuffix("_aa")[-2:], rank)
    return tuple(axis if axis < rank - spatial else None for axis in range(rank))


def _is_average_of_data(args: tuple[Any, ...]) -> bool:
    """Whether average pooling with these arguments divides by the number of the values in each window."""
    padding = args[3] if len(args) > 3 else 0
    pads = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    counts_padding = args[5] if len(args) > 5 else True
    divisor = args[6] if len(args) > 6 else None
    return divisor is None and not (pads and counts_padding)


def joins_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Concatenation | Sum | None:
    """Return how an operator joins tensors of the result's dtype and rank; None for any other."""
    name, parts = func._schema.name, tensors_in(args)
    if not isinstance(result, Tensor) or any(part.layout is not torch.strided for part in (*parts, result)):
        return None
    if any(part.dtype != result.dtype or part.dim() != result.dim() for part in parts):
        return None
    if name == "aten::cat":
        axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return Concatenation(axis % result.dim())
    alpha = kwargs.get("alpha", 1)
    if name not in _ADDITIONS or len(parts) != 2 or any(part.shape != result.shape for part in parts):
        return None
    if isinstance(alpha, bool) or alpha not in (1, -1):
        return None
    sign = -int(alpha) if name.startswith("aten::sub") else int(alpha)
    return Sum((1, sign), in_place=name.endswith("_"))


def _same_place(old: tuple[int, ...], new: tuple[int, ...], axis: int) -> int | None:
    """Return the axis of `old` with the coordinates of `axis` of `new`, values being in the same order."""
    before = math.prod(new[:axis])
    for place, size in enumerate(old):
        if size == new[axis] and math.prod(old[:place]) == before:
            return place
    return None
