"""Computes the gradient: all of it, by programs that hold whole channels; or dx alone, by coefficients."""

from __future__ import annotations

import triton
import triton.language as tl

from .statistics import coefficients, load_affine, slopes
from .sums import incoming, set_gradients, sums_of_tile, sums_of_tiles
from .tiles import NUMBERS, task_of, tile_of


@triton.jit
def _store(outputs, place, centred, dz, maps):
    """Writes dx = a dy' + b (x - center) rstd + c, and dresidual = dy', of a tile; 0 where it is masked.

    Args:
        outputs: pointers (dx, dresidual); the last one may be None.
        place: what `tiles.tile_of` returned.
        centred, dz: x - center and dy' of the tile.
        maps: (a, b, c, rstd) of the channels.
    """
    dx, dresidual = outputs
    offsets, inside, valid = place
    a, b, c, rstd = maps
    found = tl.where(valid, tl.fma(a, dz, tl.fma(b, centred * rstd, c)), 0.0)
    tl.store(dx + offsets, found.to(dx.dtype.element_ty), mask=inside)
    if dresidual is not None:
        tl.store(dresidual + offsets, dz.to(dresidual.dtype.element_ty), mask=inside)


@triton.jit
def _differentiate_tiles(
    tensors,
    outputs,
    run,
    program,
    affine,
    maps,
    ACTIVATION: tl.constexpr,
    KINK: tl.constexpr,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Writes dx and dresidual of the tiles of a run; arguments as of `sums.sums_of_tiles` and `_store`."""
    first, tiles, span = run
    for number in tl.range(0, tiles, num_stages=3):
        tile = first + number
        place = tile_of(tile, program, ROWS, OUTER, INNER, EVEN)
        centred, dz = incoming(
            tensors, tile, span, program, place, affine, ACTIVATION, KINK, REAL, ROWS, OUTER, INNER
        )
        _store(outputs, place, centred, dz, maps)


@triton.jit(do_not_specialize=NUMBERS)
def backward_whole(
    x,
    dy,
    residual,
    mask,
    weight,
    bias,
    mean,
    rstd,
    dx,
    dresidual,
    dweight,
    dbias,
    sum_dy,
    sum_dy_xhat,
    activation_mask,
    channels,
    positions,
    units,
    group_units,
    tiles,
    SINGLE: tl.constexpr,
    GIVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KINK: tl.constexpr,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Writes dx, dresidual and the sums of all values of some channels of a group.

    With one group only, its sums are dweight and dbias. A single tile stays in registers; of several, x and
    dy are read again from the cache.
    """
    first, group, channel = task_of(channels, 1, ROWS, INNER)
    program = (group, channel, mask, (channels, positions, units, group_units))
    tensors, outputs, run = (x, dy, residual, activation_mask), (dx, dresidual), (first, tiles, tiles)
    affine, rest, wide_rstd = load_affine(mean, rstd, weight, bias, program, REAL)
    narrow_rstd = wide_rstd.to(REAL)
    if SINGLE:
        place = tile_of(first, program, ROWS, OUTER, INNER, EVEN)
        centred, dz = incoming(
            tensors, first, tiles, program, place, affine, ACTIVATION, KINK, REAL, ROWS, OUTER, INNER
        )
        count, total_dy, total_dy_xhat = sums_of_tile(centred, dz, place[2], narrow_rstd, REAL, ROWS)
    else:
        count, total_dy, total_dy_xhat = sums_of_tiles(
            tensors, run, program, narrow_rstd, affine, ACTIVATION, KINK, REAL, ROWS, OUTER, INNER, EVEN
        )
    total_dy_xhat = tl.fma(-rest * wide_rstd, total_dy, total_dy_xhat)
    is_channel = channel < channels
    found = coefficients(count, total_dy, total_dy_xhat, wide_rstd, weight, channel, is_channel, GIVEN)
    maps = slopes(found, rest, wide_rstd, REAL)
    if SINGLE:
        _store(outputs, place, centred, dz, maps)
    else:
        _differentiate_tiles(
            tensors, outputs, run, program, affine, maps, ACTIVATION, KINK, REAL, ROWS, OUTER, INNER, EVEN
        )
    set_gradients(dweight, dbias, channel, is_channel, total_dy, total_dy_xhat)
    if sum_dy is not None:
        tl.store(sum_dy + group * channels + channel, total_dy, mask=is_channel)
        tl.store(sum_dy_xhat + group * channels + channel, total_dy_xhat, mask=is_channel)


@triton.jit(do_not_specialize=NUMBERS)
def differentiate(
    x,
    dy,
    residual,
    mask,
    weight,
    bias,
    mean,
    rstd,
    a,
    b,
    c,
    dx,
    dresidual,
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
    """Writes dx and dresidual of this program's part, by coefficients `[G, C]`."""
    part, group, channel = task_of(channels, parts, ROWS, INNER)
    is_channel = channel < channels
    place = group * channels + channel
    program = (group, channel, mask, (channels, positions, units, group_units))
    affine, rest, wide_rstd = load_affine(mean, rstd, weight, bias, program, REAL)
    given = (
        tl.load(a + place, mask=is_channel, other=0.0),
        tl.load(b + place, mask=is_channel, other=0.0),
        tl.load(c + place, mask=is_channel, other=0.0),
    )
    tensors, outputs, run = (x, dy, residual, activation_mask), (dx, dresidual), (part * tiles, tiles, span)
    maps = slopes(given, rest, wide_rstd, REAL)
    _differentiate_tiles(
        tensors, outputs, run, program, affine, maps, ACTIVATION, KINK, REAL, ROWS, OUTER, INNER, EVEN
    )
