"""The gradient: all of it by programs that take whole channels; or dx alone, by coefficients."""

from __future__ import annotations

import triton
import triton.language as tl

from .statistics import affine, coefficients, slopes
from .sums import incoming, set_gradients, sums_of_tiles
from .tiles import NUMBERS, task_of, tile_of, total


@triton.jit
def _store(dx, dresidual, offsets, inside, valid, away, dz, rstd, a, b, c):
    """Write dx = a dy' + b (x - center) rstd + c, and dresidual = dy', of a tile; 0 where it is masked."""
    found = tl.where(valid, tl.fma(a, dz, tl.fma(b, away * rstd, c)), 0.0)
    tl.store(dx + offsets, found.to(dx.dtype.element_ty), mask=inside)
    if dresidual is not None:
        tl.store(dresidual + offsets, dz.to(dresidual.dtype.element_ty), mask=inside)


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
    """Write dx, dresidual and the sums of all values of some channels of a group.

    Sums of the one group that there is are dweight and dbias. A single tile stays in registers; of several, x
    and dy are read again from the cache.
    """
    first, group, channel = task_of(channels, 1, ROWS, INNER)
    is_channel = channel < channels
    place = group * channels + channel
    wide_rstd = tl.load(rstd + place, mask=is_channel, other=0.0)
    center, scale, shift, rest = affine(
        tl.load(mean + place, mask=is_channel, other=0.0), wide_rstd, weight, bias, channel, is_channel, REAL
    )
    narrow_rstd = wide_rstd.to(REAL)
    shape = (channels, positions, units, group_units)
    if SINGLE:
        offsets, inside, valid = tile_of(first, group, channel, mask, shape, ROWS, OUTER, INNER, EVEN)
        away, dz = incoming(
            x,
            dy,
            residual,
            offsets,
            valid,
            center,
            scale,
            shift,
            activation_mask,
            first,
            group,
            channels,
            tiles,
            ACTIVATION,
            KINK,
            REAL,
            ROWS,
            OUTER,
            INNER,
        )
        count = total(valid.to(REAL), ROWS).to(tl.float64)
        total_dy = total(dz, ROWS).to(tl.float64)
        total_dy_xhat = total(dz * (away * narrow_rstd), ROWS).to(tl.float64)
    else:
        count, total_dy, total_dy_xhat = sums_of_tiles(
            x,
            dy,
            residual,
            mask,
            first,
            tiles,
            group,
            channel,
            shape,
            center,
            scale,
            shift,
            narrow_rstd,
            activation_mask,
            channels,
            tiles,
            ACTIVATION,
            KINK,
            REAL,
            ROWS,
            OUTER,
            INNER,
            EVEN,
        )
    total_dy_xhat = tl.fma(-rest * wide_rstd, total_dy, total_dy_xhat)
    wide_a, wide_b, wide_c = coefficients(
        count, total_dy, total_dy_xhat, wide_rstd, weight, channel, is_channel, GIVEN
    )
    a, b, c = slopes(wide_a, wide_b, wide_c, rest, wide_rstd, REAL)
    if SINGLE:
        _store(dx, dresidual, offsets, inside, valid, away, dz, narrow_rstd, a, b, c)
    else:
        for tile in tl.range(0, tiles, num_stages=3):
            offsets, inside, valid = tile_of(
                first + tile, group, channel, mask, shape, ROWS, OUTER, INNER, EVEN
            )
            away, dz = incoming(
                x,
                dy,
                residual,
                offsets,
                valid,
                center,
                scale,
                shift,
                activation_mask,
                first + tile,
                group,
                channels,
                tiles,
                ACTIVATION,
                KINK,
                REAL,
                ROWS,
                OUTER,
                INNER,
            )
            _store(dx, dresidual, offsets, inside, valid, away, dz, narrow_rstd, a, b, c)
    set_gradients(dweight, dbias, channel, is_channel, total_dy, total_dy_xhat)
    if sum_dy is not None:
        tl.store(sum_dy + place, total_dy, mask=is_channel)
        tl.store(sum_dy_xhat + place, total_dy_xhat, mask=is_channel)


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
    """Write dx and dresidual of this program's part, by coefficients `[G, C]`."""
    part, group, channel = task_of(channels, parts, ROWS, INNER)
    is_channel = channel < channels
    place = group * channels + channel
    wide_rstd = tl.load(rstd + place, mask=is_channel, other=0.0)
    center, scale, shift, rest = affine(
        tl.load(mean + place, mask=is_channel, other=0.0), wide_rstd, weight, bias, channel, is_channel, REAL
    )
    narrow_a, narrow_b, narrow_c = slopes(
        tl.load(a + place, mask=is_channel, other=0.0),
        tl.load(b + place, mask=is_channel, other=0.0),
        tl.load(c + place, mask=is_channel, other=0.0),
        rest,
        wide_rstd,
        REAL,
    )
    narrow_rstd = wide_rstd.to(REAL)
    shape = (channels, positions, units, group_units)
    for tile in tl.range(0, tiles, num_stages=3):
        offsets, inside, valid = tile_of(
            part * tiles + tile, group, channel, mask, shape, ROWS, OUTER, INNER, EVEN
        )
        away, dz = incoming(
            x,
            dy,
            residual,
            offsets,
            valid,
            center,
            scale,
            shift,
            activation_mask,
            part * tiles + tile,
            group,
            channels,
            span,
            ACTIVATION,
            KINK,
            REAL,
            ROWS,
            OUTER,
            INNER,
        )
        _store(dx, dresidual, offsets, inside, valid, away, dz, narrow_rstd, narrow_a, narrow_b, narrow_c)
