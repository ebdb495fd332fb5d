"""Computes a tile of a few whole rows of a block of columns, for which a column's parameters are loaded once.

A whole row's parameters do not stay in the first-level cache. Tiles are for calls without a mask and without
an activation other than bounds (SIMPLE); for other calls, and for incomplete rows, rows.py goes row by row.
"""

from __future__ import annotations

from typing import Any

from .access import LINE, load, load_part, prefetch, size_of, store
from .activations import bounded, within
from .elementwise import CENTER, RSTD, SCALE, SHIFT, A, B, C, put, some
from .llvm import LANES
from .vector import function, multiply_add, splat

SUMMED, WRITTEN = 4, 2  # rows of a tile that is summed, and of one that is normalized or differentiated
_AHEAD = 2**14  # bytes between a value and those that are prefetched meanwhile, at least


@function
def distance(args: Any, unit: Any, end: Any, fold: Any, rows: Any, dtype: Any) -> Any:
    """Returns the bytes from a tile to the rows to prefetch meanwhile; 0 where the units end before these.

    Args:
        args: the call's arguments.
        unit: the tile's first unit.
        end: end of the units.
        fold: units of a row.
        rows: rows of the tile.
        dtype: of the tensors in memory.
    """
    step = args.columns * size_of(dtype)
    away = max(rows, (_AHEAD + step - 1) // step)
    return away * step if end - unit >= (away + rows) * fold else 0


@function
def _prefetch_vector(address: Any, dtype: Any) -> None:
    for line in range(0, LANES * size_of(dtype), LINE):
        prefetch(address + line)


@function
def add_deviations(
    args: Any,
    place: Any,
    width: Any,
    ahead: Any,
    centers: Any,
    factor: Any,
    sums: Any,
    variant: Any,
) -> None:
    """Adds x * factor - center, and its square, to the two rows of sums, per column.

    Args:
        args: the call's arguments.
        place: index of the tile's first value in its tensor.
        width: number of columns.
        ahead: bytes from a value to the one to prefetch meanwhile; 0 prefetches nothing.
        centers: a number per column.
        factor: of x.
        sums: `[2, width + LANES]`.
        variant: see `vector.Variant`.
    """
    dtype, real = variant.dtype, variant.real
    step, number = args.columns * size_of(dtype), size_of(real)
    scale = splat(factor, real)
    first, second = sums.ctypes.data, sums.ctypes.data + sums.shape[1] * number
    for start in range(0, width, LANES):
        s, q = load(first + start * number, real), load(second + start * number, real)
        center = load(centers.ctypes.data + start * number, real)
        x = args.x + (place + start) * size_of(dtype)
        if start + LANES <= width:
            if ahead:
                for row in range(SUMMED):
                    _prefetch_vector(x + ahead + row * step, dtype)
            v0, v1 = load(x, dtype) * scale - center, load(x + step, dtype) * scale - center
            v2 = load(x + 2 * step, dtype) * scale - center
            v3 = load(x + 3 * step, dtype) * scale - center
            s = s + ((v0 + v1) + (v2 + v3))
            q = multiply_add(v3, v3, multiply_add(v2, v2, multiply_add(v1, v1, multiply_add(v0, v0, q))))
        else:
            fill = center * splat(1 / factor, real)
            for _ in range(SUMMED):
                deviation = load_part(x, width - start, fill, dtype) * scale - center
                s, q = s + deviation, multiply_add(deviation, deviation, q)
                x += step
        store(s, first + start * number, real)
        store(q, second + start * number, real)


@function
def add_gradients(
    args: Any,
    place: Any,
    width: Any,
    ahead: Any,
    given: Any,
    sums: Any,
    variant: Any,
) -> None:
    """Adds dy' and dy' (x - center) rstd to the two rows of sums, by parameters `given`, all per column."""
    dtype, real = variant.dtype, variant.real
    step, number, zero = args.columns * size_of(dtype), size_of(real), splat(0.0, real)
    row, parameters = given.shape[1] * number, given.ctypes.data
    first, second = sums.ctypes.data, sums.ctypes.data + sums.shape[1] * number
    low, high = splat(args.low_kink, real), splat(args.high_kink, real)
    for start in range(0, width, LANES):
        s, q = load(first + start * number, real), load(second + start * number, real)
        column, count = parameters + start * number, width - start
        center, rstd = load(column + CENTER * row, real), load(column + RSTD * row, real)
        scale, shift = load(column + SCALE * row, real), load(column + SHIFT * row, real)
        offset = (place + start) * size_of(dtype)
        x, dy = args.x + offset, args.dy + offset
        residual = args.residual + offset if args.residual else 0
        for _ in range(0, SUMMED, 2):
            if ahead:
                _prefetch_vector(x + ahead, dtype)
                _prefetch_vector(x + ahead + step, dtype)
                _prefetch_vector(dy + ahead, dtype)
                _prefetch_vector(dy + ahead + step, dtype)
            v0, v1 = some(x, count, center, dtype) - center, some(x + step, count, center, dtype) - center
            z0, z1 = multiply_add(v0, scale, shift), multiply_add(v1, scale, shift)
            if residual:
                z0 = z0 + some(residual, count, zero, dtype)
                z1 = z1 + some(residual + step, count, zero, dtype)
                residual += 2 * step
            d0 = within(some(dy, count, zero, dtype), z0, low, high, real)
            d1 = within(some(dy + step, count, zero, dtype), z1, low, high, real)
            s, q = s + (d0 + d1), multiply_add(d1, v1 * rstd, multiply_add(d0, v0 * rstd, q))
            x += 2 * step
            dy += 2 * step
        store(s, first + start * number, real)
        store(q, second + start * number, real)


@function
def _streams(args: Any, address: Any, dtype: Any) -> Any:
    """Returns whether an output's rows are written past the caches: each must begin at a cache line."""
    return args.stream and (address | args.columns * size_of(dtype)) & (LINE - 1) == 0


@function
def normalize(args: Any, place: Any, width: Any, ahead: Any, given: Any, variant: Any) -> None:
    """Writes y of `width` columns, LANES or more; the last vector may overlap the one before it."""
    dtype, real = variant.dtype, variant.real
    step, number = args.columns * size_of(dtype), size_of(real)
    row, parameters = given.shape[1] * number, given.ctypes.data
    low, high = splat(args.low, real), splat(args.high, real)
    streams = _streams(args, args.y, dtype)
    for start in range(0, width, LANES):
        if start + LANES > width:
            start, streams = width - LANES, False
        column, offset = parameters + start * number, (place + start) * size_of(dtype)
        center, scale = load(column + CENTER * row, real), load(column + SCALE * row, real)
        shift = load(column + SHIFT * row, real)
        x, y = args.x + offset, args.y + offset
        if ahead:
            _prefetch_vector(x + ahead, dtype)
            _prefetch_vector(x + ahead + step, dtype)
        z0 = multiply_add(load(x, dtype) - center, scale, shift)
        z1 = multiply_add(load(x + step, dtype) - center, scale, shift)
        if args.residual:
            z0 = z0 + load(args.residual + offset, dtype)
            z1 = z1 + load(args.residual + offset + step, dtype)
        put(bounded(z0, low, high), y, LANES, streams, dtype)
        put(bounded(z1, low, high), y + step, LANES, streams, dtype)


@function
def differentiate(args: Any, place: Any, width: Any, ahead: Any, given: Any, variant: Any) -> None:
    """Writes dx of `width` columns, LANES or more, and dresidual where there is a residual."""
    dtype, real = variant.dtype, variant.real
    step, number = args.columns * size_of(dtype), size_of(real)
    row, parameters = given.shape[1] * number, given.ctypes.data
    low, high = splat(args.low_kink, real), splat(args.high_kink, real)
    streams = _streams(args, args.dx | args.dresidual, dtype)
    for start in range(0, width, LANES):
        if start + LANES > width:
            start, streams = width - LANES, False
        column, offset = parameters + start * number, (place + start) * size_of(dtype)
        center, scale = load(column + CENTER * row, real), load(column + SCALE * row, real)
        shift, rstd = load(column + SHIFT * row, real), load(column + RSTD * row, real)
        a, b = load(column + A * row, real), load(column + B * row, real)
        c = load(column + C * row, real)
        x, dy, dx = args.x + offset, args.dy + offset, args.dx + offset
        if ahead:
            _prefetch_vector(x + ahead, dtype)
            _prefetch_vector(x + ahead + step, dtype)
            _prefetch_vector(dy + ahead, dtype)
            _prefetch_vector(dy + ahead + step, dtype)
        v0, v1 = load(x, dtype) - center, load(x + step, dtype) - center
        z0, z1 = multiply_add(v0, scale, shift), multiply_add(v1, scale, shift)
        if args.residual:
            z0 = z0 + load(args.residual + offset, dtype)
            z1 = z1 + load(args.residual + offset + step, dtype)
        d0 = within(load(dy, dtype), z0, low, high, real)
        d1 = within(load(dy + step, dtype), z1, low, high, real)
        if args.dresidual:
            put(d0, args.dresidual + offset, LANES, streams, dtype)
            put(d1, args.dresidual + offset + step, LANES, streams, dtype)
        put(multiply_add(a, d0, multiply_add(b, v0 * rstd, c)), dx, LANES, streams, dtype)
        put(multiply_add(a, d1, multiply_add(b, v1 * rstd, c)), dx + step, LANES, streams, dtype)
