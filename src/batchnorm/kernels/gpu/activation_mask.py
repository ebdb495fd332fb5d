"""One bit per value for the backward: whether the activation has a slope there. Eight values make a byte."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of(tile, group, channels, span, ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Return where the bytes of a tile are, and whether it is one of the `span` tiles of its group.

    The last part of a group may have more tiles than there are.
    """
    blocks = channels
    if ROWS:
        blocks = tl.cdiv(channels, INNER)
    number = (group * blocks + tl.program_id(0) % blocks) * span + tile
    at = tl.arange(0, OUTER * INNER // 8)
    return number * (OUTER * INNER // 8) + at, at * 0 + tile < span


@triton.jit
def store_mask_bits(activation_mask, place, is_tile, is_open, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Write the bits of a tile, if it is one."""
    bits = tl.reshape(tl.where(is_open, 1, 0), [OUTER * INNER // 8, 8]) << tl.arange(0, 8)[None, :]
    tl.store(activation_mask + place, tl.sum(bits, 1).to(tl.uint8), mask=is_tile)


@triton.jit
def load_mask_bits(activation_mask, place, is_tile, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Return a tile of flags, whether its bits are set; none is, if it is no tile."""
    found = tl.load(activation_mask + place, mask=is_tile, other=0).to(tl.int32)
    bits = (found[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(bits, [OUTER, INNER]) != 0
