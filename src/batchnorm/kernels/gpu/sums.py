"""The gradient's sums per channel: of tiles, of parts, which are merged, and of groups."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation_mask import load_mask_bits, place_of
from .activations import through
from .statistics import affine, coefficients, rest_of
from .tiles import NUMBERS, merge_of, task_of, tile_of, total, values_of


@triton.jit
def incoming(
    x,
    dy,
    residual,
    offsets,
    valid,
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
    """Return x - center and dy' = dy * activation'(z) of a tile, 0 where it is masked."""
    away = values_of(x, offsets, valid, REAL) - center
    dz = values_of(dy, offsets, valid, REAL)
    if activation_mask is not None:
        place, is_tile = place_of(tile, group, channels, span, ROWS, OUTER, INNER)
        dz = tl.where(load_mask_bits(activation_mask, place, is_tile, OUTER, INNER), dz, 0.0)
    elif ACTIVATION is not None:
        z = tl.fma(away, scale, shift)
        if residual is not None:
            z += values_of(residual, offsets, valid, REAL)
        dz = tl.where(valid, through(dz, z, ACTIVATION, KINK), 0.0)
    return tl.where(valid, away, 0.0), dz


@triton.jit
def set_gradients(dweight, dbias, channel, mask, sum_dy, sum_dy_xhat):
    """Write dweight and dbias of channels, where they are wanted."""
    if dweight is not None:
        tl.store(dweight + channel, sum_dy_xhat, mask=mask)
        tl.store(dbias + channel, sum_dy, mask=mask)


@triton.jit
def sums_of_tiles(
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
    rstd,
    activation_mask,
    channels,
    span,
    ACTIVATION: tl.constexpr,
    KINK: tl.constexpr,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Return count, Σ dy' and Σ dy' (x - center) rstd, float64, of `tiles` tiles from `first` on."""
    n = tl.zeros([OUTER, INNER], REAL)
    if EVEN:
        n = tl.zeros([1, 1], REAL)
    sums = tl.zeros([OUTER, INNER], REAL)
    products = tl.zeros([OUTER, INNER], REAL)
    for tile in tl.range(0, tiles, num_stages=3):
        offsets, _, valid = tile_of(first + tile, group, channel, mask, shape, ROWS, OUTER, INNER, EVEN)
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
            span,
            ACTIVATION,
            KINK,
            REAL,
            ROWS,
            OUTER,
            INNER,
        )
        if EVEN:
            n += 1.0
        else:
            n += tl.where(valid, 1.0, 0.0)
        sums += dz
        products = tl.fma(dz, away * rstd, products)
    return (
        total(tl.broadcast_to(n, [OUTER, INNER]), ROWS).to(tl.float64),
        total(sums, ROWS).to(tl.float64),
        total(products, ROWS).to(tl.float64),
    )


@triton.jit(do_not_specialize=NUMBERS)
def sum_parts(
    x,
    dy,
    residual,
    mask,
    weight,
    bias,
    mean,
    rstd,
    part_count,
    part_dy,
    part_dy_xhat,
    activation_mask,
    channels,
    positions,
    units,
    group_units,
    groups,
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
    """Write count, Σ dy' and Σ dy' (x - center) rstd of this program's part, to tables `[parts, G, C]`."""
    part, group, channel = task_of(channels, parts, ROWS, INNER)
    is_channel = channel < channels
    place = group * channels + channel
    wide_rstd = tl.load(rstd + place, mask=is_channel, other=0.0)
    center, scale, shift, _ = affine(
        tl.load(mean + place, mask=is_channel, other=0.0), wide_rstd, weight, bias, channel, is_channel, REAL
    )
    count, total_dy, total_dy_xhat = sums_of_tiles(
        x,
        dy,
        residual,
        mask,
        part * tiles,
        tiles,
        group,
        channel,
        (channels, positions, units, group_units),
        center,
        scale,
        shift,
        wide_rstd.to(REAL),
        activation_mask,
        channels,
        span,
        ACTIVATION,
        KINK,
        REAL,
        ROWS,
        OUTER,
        INNER,
        EVEN,
    )
    place = (part * groups + group) * channels + channel
    tl.store(part_count + place, count, mask=is_channel)
    tl.store(part_dy + place, total_dy, mask=is_channel)
    tl.store(part_dy_xhat + place, total_dy_xhat, mask=is_channel)


@triton.jit(do_not_specialize=NUMBERS)
def merge_sums(
    part_count,
    part_dy,
    part_dy_xhat,
    mean,
    rstd,
    weight,
    sum_dy,
    sum_dy_xhat,
    a,
    b,
    c,
    dweight,
    dbias,
    channels,
    groups,
    parts,
    GIVEN: tl.constexpr,
    REAL: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add up the parts' sums of some channels of a group; write them, the coefficients, dweight and dbias."""
    group, channel = merge_of(channels, CHANNELS)
    is_channel = channel < channels
    count = tl.zeros([1, CHANNELS], tl.float64)
    total_dy = tl.zeros([1, CHANNELS], tl.float64)
    total_dy_xhat = tl.zeros([1, CHANNELS], tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        inside = (part < parts) & is_channel
        at = (part.to(tl.int64) * groups + group) * channels + channel
        count += tl.sum(tl.load(part_count + at, mask=inside, other=0.0), 0, keep_dims=True)
        total_dy += tl.sum(tl.load(part_dy + at, mask=inside, other=0.0), 0, keep_dims=True)
        total_dy_xhat += tl.sum(tl.load(part_dy_xhat + at, mask=inside, other=0.0), 0, keep_dims=True)
    place = group * channels + channel
    found_rstd = tl.load(rstd + place, mask=is_channel, other=0.0)
    rest = rest_of(tl.load(mean + place, mask=is_channel, other=0.0), REAL)
    total_dy_xhat = tl.fma(-rest * found_rstd, total_dy, total_dy_xhat)
    if sum_dy is not None:
        tl.store(sum_dy + place, total_dy, mask=is_channel)
        tl.store(sum_dy_xhat + place, total_dy_xhat, mask=is_channel)
    if a is not None:
        found_a, found_b, found_c = coefficients(
            count, total_dy, total_dy_xhat, found_rstd, weight, channel, is_channel, GIVEN
        )
        tl.store(a + place, found_a, mask=is_channel)
        tl.store(b + place, found_b, mask=is_channel)
        tl.store(c + place, found_c, mask=is_channel)
    set_gradients(dweight, dbias, channel, is_channel, total_dy, total_dy_xhat)


@triton.jit(do_not_specialize=NUMBERS)
def add_groups(
    sum_dy,
    sum_dy_xhat,
    dweight,
    dbias,
    channels,
    groups,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write dweight and dbias of some channels: the sums `[G, C]` of all groups, in float64."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    is_channel = channel < channels
    total_dy = tl.zeros([1, CHANNELS], tl.float64)
    total_dy_xhat = tl.zeros([1, CHANNELS], tl.float64)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)[:, None].to(tl.int64)
        inside = (group < groups) & is_channel
        place = group * channels + channel
        total_dy += tl.sum(tl.load(sum_dy + place, mask=inside, other=0.0), 0, keep_dims=True)
        total_dy_xhat += tl.sum(tl.load(sum_dy_xhat + place, mask=inside, other=0.0), 0, keep_dims=True)
    set_gradients(dweight, dbias, channel, is_channel, total_dy, total_dy_xhat)
