"""Computes the gradient's sums per channel: of tiles; of parts, which are merged; and of groups."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation_mask import load_mask_bits
from .activations import through
from .statistics import coefficients, load_affine, rest_of
from .tiles import NUMBERS, merge_of, task_of, tile_of, total, values_of


@triton.jit
def incoming(
    tensors,
    tile,
    span,
    program,
    place,
    affine,
    ACTIVATION: tl.constexpr,
    KINK: tl.constexpr,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):
    """Returns x - center and dy' = dy * activation'(z) of a tile, 0 where it is masked.

    Args:
        tensors: pointers (x, dy, residual, activation_mask); the last two may be None.
        tile: number of the tile in the group, which has `span` tiles.
        span: see tile.
        program: see `tiles.tile_of`.
        place: what `tiles.tile_of` returned.
        affine: (center, scale, shift) of z.
    """
    x, dy, residual, activation_mask = tensors
    offsets, _, valid = place
    center, scale, shift = affine
    centred = values_of(x, offsets, valid, REAL) - center
    dz = values_of(dy, offsets, valid, REAL)
    if activation_mask is not None:
        dz = tl.where(load_mask_bits(activation_mask, tile, span, program, ROWS, OUTER, INNER), dz, 0.0)
    elif ACTIVATION is not None:
        z = tl.fma(centred, scale, shift)
        if residual is not None:
            z += values_of(residual, offsets, valid, REAL)
        dz = tl.where(valid, through(dz, z, ACTIVATION, KINK), 0.0)
    return tl.where(valid, centred, 0.0), dz


@triton.jit
def set_gradients(dweight, dbias, channel, mask, sum_dy, sum_dy_xhat):
    """Writes dweight and dbias of channels, unless these are None."""
    if dweight is not None:
        tl.store(dweight + channel, sum_dy_xhat, mask=mask)
        tl.store(dbias + channel, sum_dy, mask=mask)


@triton.jit
def sums_of_tile(centred, dz, valid, rstd, REAL: tl.constexpr, ROWS: tl.constexpr):
    """Returns count, Σ dy' and Σ dy' (x - center) rstd, float64, of a tile."""
    return (
        total(valid.to(REAL), ROWS).to(tl.float64),
        total(dz, ROWS).to(tl.float64),
        total(dz * (centred * rstd), ROWS).to(tl.float64),
    )


@triton.jit
def sums_of_tiles(
    tensors,
    run,
    program,
    rstd,
    affine,
    ACTIVATION: tl.constexpr,
    KINK: tl.constexpr,
    REAL: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Returns count, Σ dy' and Σ dy' (x - center) rstd, float64, of the tiles of a run.

    Args:
        tensors, program, affine: see `incoming`.
        run: (first, tiles, span), `tiles` tiles from `first` on of the `span` tiles of the group.
        rstd: of the channels.
    """
    first, tiles, span = run
    n = tl.zeros([OUTER, INNER], REAL)
    if EVEN:
        n = tl.zeros([1, 1], REAL)
    sums = tl.zeros([OUTER, INNER], REAL)
    products = tl.zeros([OUTER, INNER], REAL)
    for number in tl.range(0, tiles, num_stages=3):
        tile = first + number
        place = tile_of(tile, program, ROWS, OUTER, INNER, EVEN)
        centred, dz = incoming(
            tensors, tile, span, program, place, affine, ACTIVATION, KINK, REAL, ROWS, OUTER, INNER
        )
        if EVEN:
            n += 1.0
        else:
            n += tl.where(place[2], 1.0, 0.0)
        sums += dz
        products = tl.fma(dz, centred * rstd, products)
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
    """Writes count, Σ dy' and Σ dy' (x - center) rstd of this program's part, to tables `[parts, G, C]`."""
    part, group, channel = task_of(channels, parts, ROWS, INNER)
    program = (group, channel, mask, (channels, positions, units, group_units))
    affine, _, wide_rstd = load_affine(mean, rstd, weight, bias, program, REAL)
    tensors, run = (x, dy, residual, activation_mask), (part * tiles, tiles, span)
    narrow_rstd = wide_rstd.to(REAL)
    count, total_dy, total_dy_xhat = sums_of_tiles(
        tensors, run, program, narrow_rstd, affine, ACTIVATION, KINK, REAL, ROWS, OUTER, INNER, EVEN
    )
    is_channel = channel < channels
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
    """Adds up parts' sums of some channels of a group; writes these, coefficients, dweight and dbias."""
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
    """Writes dweight and dbias of some channels: the sums `[G, C]` of all groups, added in float64."""
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
