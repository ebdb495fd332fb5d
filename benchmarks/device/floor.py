"""The least passes of a tensor between memory and chip: the floor under the time of a layer."""

from __future__ import annotations

ONE_PASS, SPLIT = "one pass", "split"
_ON_CHIP = 192 * 1024  # bytes of registers or shared memory that a block may fill, of 228 to 256 KB
_SECTOR = 32  # bytes that memory moves at least: of channels side by side, so many are read together


def regime(shape: tuple[int, ...], layout: str, element_bytes: int) -> str:
    """Return whether a channel stays on chip between its moments and its normalization, or is read twice.

    A rule of size, and the one place where it is decided: the backward has to hold x and dy, and of
    channels-last whole sectors.
    """
    values = shape[0]
    for size in shape[2:]:
        values *= size
    side_by_side = 1 if layout == "contiguous" else max(1, _SECTOR // element_bytes)
    return ONE_PASS if 2 * values * element_bytes * side_by_side <= _ON_CHIP else SPLIT


def passes(regime: str, residual: bool) -> int:
    """Return how often a tensor is read or written, forward and backward.

    On chip 5 times (x, y; x, dy, dx), else 8 (x, x, y; x, dy, x, dy, dx); a residual is read and its gradient
    written: 2 more.
    """
    return (5 if regime == ONE_PASS else 8) + (2 if residual else 0)
