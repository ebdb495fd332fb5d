"""Stores one bit per value for the backward, whether the activation has a slope there; eight in a byte."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bytes_of(tile, span, program, ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Returns the indices of a tile's bytes, and whether it is one of the `span` tiles of its group.

    The last part of a group may go through tiles beyond these.
    """
    group, _, _, shape = program
    blocks, _, _, _ = shape
    if ROWS:
        blocks = tl.cdiv(blocks, INNER)
    number = (group * blocks + tl.program_id(0) % blocks) * span + tile
    at = tl.arange(0, OUTER * INNER // 8)
    return number * (OUTER * INNER // 8) + at, at * 0 + tile < span


@triton.jit
def store_mask_bits(
    activation_mask,
    tile,
    span,
    program,
    has_slope,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):
    """Writes the bits of a tile, if it is one of the group's `span` tiles."""
    place, is_tile = _bytes_of(tile, span, program, ROWS, OUTER, INNER)
    bits = tl.reshape(tl.where(has_slope, 1, 0), [OUTER * INNER // 8, 8]) << tl.arange(0, 8)[None, :]
    tl.store(activation_mask + place, tl.sum(bits, 1).to(tl.uint8), mask=is_tile)


@triton.jit
def load_mask_bits(
    activation_mask, tile, span, program, ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr
):
    """Returns whether the bits of a tile are set; none is, if it is not one of the group's `span` tiles."""
    place, is_tile = _bytes_of(tile, span, program, ROWS, OUTER, INNER)
    found = tl.load(activation_mask + place, mask=is_tile, other=0).to(tl.int32)
    bits = (found[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(bits, [OUTER, INNER]) != 0
