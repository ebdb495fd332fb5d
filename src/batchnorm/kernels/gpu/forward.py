"""y of x: the whole forward, by programs that hold whole channels; and the normalization by itself."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation_mask import place_of, store_mask_bits
from .activations import activated, through
from .moments import moments_of_tile, moments_of_tiles
from .statistics import affine, move_by_batch, set_moments
from .tiles import NUMBERS, task_of, tile_of, values_of


@triton.jit
def _store(
    y,
    residual,
    offsets,
    inside,
    valid,
    values,
    center,
    scale,
    shift,
    activation_mask,
    tile,
    group,
    channels,
    span,
    ACTIVATION: tl.constexpr,
    KINK: tl.constexpr,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):
    """Write y of a tile, 0 where it is masked; and where the activation has a slope, if that is kept."""
    z = tl.fma(values - center, scale, shift)
    if residual is not None:
        z += values_of(residual, offsets, valid, REAL)
    found = tl.where(valid, activated(z, ACTIVATION), 0.0)
    tl.store(y + offsets, found.to(y.dtype.element_ty), mask=inside)
    if activation_mask is not None:
        is_open = through(tl.full([OUTER, INNER], 1.0, REAL), z, ACTIVATION, KINK) != 0.0
        place, is_tile = place_of(tile, group, channels, span, ROWS, OUTER, INNER)
        store_mask_bits(activation_mask, place, is_tile, is_open, OUTER, INNER)


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
    """Measure and normalize all values of some channels of a group, and move their running statistics.

    A single tile stays in registers; of several, x is read again from the cache.
    """
    first, group, channel = task_of(channels, 1, ROWS, INNER)
    is_channel = channel < channels
    shape = (channels, positions, units, group_units)
    if SINGLE:
        offsets, inside, valid = tile_of(first, group, channel, mask, shape, ROWS, OUTER, INNER, EVEN)
        values = values_of(x, offsets, valid, REAL)
        found_count, found_mean, found_m2 = moments_of_tile(values, valid, ROWS, REAL)
    else:
        found_count, found_mean, found_m2 = moments_of_tiles(
            x, mask, tiles, group, channel, shape, REAL, ROWS, OUTER, INNER, EVEN
        )
    found_rstd = set_moments(
        count, mean, m2, rstd, group, channels, channel, is_channel, EPS, found_count, found_mean, found_m2
    )
    center, scale, shift, _ = affine(found_mean, found_rstd, weight, bias, channel, is_channel, REAL)
    if SINGLE:
        _store(
            y,
            residual,
            offsets,
            inside,
            valid,
            values,
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
    else:
        for tile in tl.range(0, tiles, num_stages=3):
            offsets, inside, valid = tile_of(
                first + tile, group, channel, mask, shape, ROWS, OUTER, INNER, EVEN
            )
            values = values_of(x, offsets, valid, REAL)
            _store(
                y,
                residual,
                offsets,
                inside,
                valid,
                values,
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
    move_by_batch(
        running_mean,
        running_var,
        batches,
        channel,
        is_channel,
        momentum,
        found_count,
        found_mean,
        found_m2,
    )


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
    """Write y of this program's part, by mean and rstd `[G, C]`."""
    part, group, channel = task_of(channels, parts, ROWS, INNER)
    is_channel = channel < channels
    place = group * channels + channel
    center, scale, shift, _ = affine(
        tl.load(mean + place, mask=is_channel, other=0.0),
        tl.load(rstd + place, mask=is_channel, other=0.0),
        weight,
        bias,
        channel,
        is_channel,
        REAL,
    )
    shape = (channels, positions, units, group_units)
    for tile in tl.range(0, tiles, num_stages=3):
        offsets, inside, valid = tile_of(
            part * tiles + tile, group, channel, mask, shape, ROWS, OUTER, INNER, EVEN
        )
        values = values_of(x, offsets, valid, REAL)
        _store(
            y,
            residual,
            offsets,
            inside,
            valid,
            values,
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
