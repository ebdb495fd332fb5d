"""Computes y: with the moments, by programs that hold whole channels; or by given statistics."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation_mask import store_mask_bits
from .activations import activated, through
from .moments import moments_of_tile, moments_of_tiles
from .statistics import affine_of, load_affine, move_by_batch, set_moments
from .tiles import NUMBERS, task_of, tile_of, values_of


@triton.jit
def _store(
    outputs,
    residual,
    tile,
    span,
    program,
    place,
    values,
    affine,
    ACTIVATION: tl.constexpr,
    KINK: tl.constexpr,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):
    """Writes y of a tile, 0 where it is masked; and the bits of `activation_mask`, where there is one.

    Args:
        outputs: pointers (y, activation_mask); the last one may be None.
        residual: pointer, or None.
        tile: number of the tile in the group, which has `span` tiles.
        span: see tile.
        program: see `tiles.tile_of`.
        place: what `tiles.tile_of` returned.
        values: x in the tile.
        affine: (center, scale, shift) of z.
    """
    y, activation_mask = outputs
    offsets, inside, valid = place
    center, scale, shift = affine
    z = tl.fma(values - center, scale, shift)
    if residual is not None:
        z += values_of(residual, offsets, valid, REAL)
    found = tl.where(valid, activated(z, ACTIVATION), 0.0)
    tl.store(y + offsets, found.to(y.dtype.element_ty), mask=inside)
    if activation_mask is not None:
        has_slope = through(tl.full([OUTER, INNER], 1.0, REAL), z, ACTIVATION, KINK) != 0.0
        store_mask_bits(activation_mask, tile, span, program, has_slope, ROWS, OUTER, INNER)


@triton.jit
def _normalize_tiles(
    x,
    outputs,
    residual,
    run,
    program,
    affine,
    ACTIVATION: tl.constexpr,
    KINK: tl.constexpr,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Writes y of the tiles of a run; its other arguments are as of `_store`.

    Args:
        run: (first, tiles, span), `tiles` tiles from `first` on of the `span` tiles of the group.
    """
    first, tiles, span = run
    for number in tl.range(0, tiles, num_stages=3):
        tile = first + number
        place = tile_of(tile, program, ROWS, OUTER, INNER, EVEN)
        values = values_of(x, place[0], place[2], REAL)
        _store(
            outputs,
            residual,
            tile,
            span,
            program,
            place,
            values,
            affine,
            ACTIVATION,
            KINK,
            REAL,
            ROWS,
            OUTER,
            INNER,
        )


@triton.jit(do_not_specialize=NUMBERS)
def forward_whole(
    x,
    y,
    residual,
    mask,
    weight,
    bias,
    count,
    mean,
    m2,
    rstd,
    running_mean,
    running_var,
    batches,
    activation_mask,
    momentum: tl.float64,
    channels,
    positions,
    units,
    group_units,
    tiles,
    EPS: tl.constexpr,
    SINGLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KINK: tl.constexpr,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Measures and normalizes all values of some channels of a group, and moves their running statistics.

    A single tile stays in registers; of several, x is read again from the cache.
    """
    first, group, channel = task_of(channels, 1, ROWS, INNER)
    program = (group, channel, mask, (channels, positions, units, group_units))
    if SINGLE:
        place = tile_of(first, program, ROWS, OUTER, INNER, EVEN)
        values = values_of(x, place[0], place[2], REAL)
        found = moments_of_tile(values, place[2], ROWS, REAL)
    else:
        found = moments_of_tiles(x, tiles, program, REAL, ROWS, OUTER, INNER, EVEN)
    found_rstd = set_moments(count, mean, m2, rstd, found, group, channels, channel, EPS)
    is_channel = channel < channels
    center, scale, shift, _ = affine_of(found[1], found_rstd, weight, bias, channel, is_channel, REAL)
    affine, outputs = (center, scale, shift), (y, activation_mask)
    if SINGLE:
        _store(
            outputs,
            residual,
            first,
            tiles,
            program,
            place,
            values,
            affine,
            ACTIVATION,
            KINK,
            REAL,
            ROWS,
            OUTER,
            INNER,
        )
    else:
        run = (first, tiles, tiles)
        _normalize_tiles(
            x, outputs, residual, run, program, affine, ACTIVATION, KINK, REAL, ROWS, OUTER, INNER, EVEN
        )
    move_by_batch(running_mean, running_var, batches, channel, is_channel, momentum, found)


@triton.jit(do_not_specialize=NUMBERS)
def normalize(
    x,
    y,
    residual,
    mask,
    weight,
    bias,
    mean,
    rstd,
    activation_mask,
    channels,
    positions,
    units,
    group_units,
    parts,
    tiles,
    span,
    ACTIVATION: tl.constexpr,
    KINK: tl.constexpr,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Writes y of this program's part, by mean and rstd `[G, C]`."""
    part, group, channel = task_of(channels, parts, ROWS, INNER)
    program = (group, channel, mask, (channels, positions, units, group_units))
    affine, _, _ = load_affine(mean, rstd, weight, bias, program, REAL)
    outputs, run = (y, activation_mask), (part * tiles, tiles, span)
    _normalize_tiles(
        x, outputs, residual, run, program, affine, ACTIVATION, KINK, REAL, ROWS, OUTER, INNER, EVEN
    )
