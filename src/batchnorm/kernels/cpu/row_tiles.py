"""A strip: a few whole rows of a block of columns, for which a column's parameters are loaded once.

All of a row's parameters together do not stay in the first cache. Strips are for calls without a mask and
with bounds as the activation at most (SIMPLE); rows.py does the others, and what is no whole row, row by row.
"""

from __future__ import annotations

from typing import Any

from .access import LINE, load, load_part, prefetch, size_of, store
from .activations import bounded, within
from .elementwise import CENTER, RSTD, SCALE, SHIFT, A, B, C, put, some
from .llvm import LANES
from .vector import function, multiply_add, splat

SUMMED, WRITTEN = 4, 2  # rows
_AHEAD = 2**14  # bytes that are asked for ahead, at least


@function
def distance(args: Any, unit: Any, last: Any, fold: Any, rows: Any, kind: Any) -> Any:
    """Return how many bytes away the rows are that are asked for ahead; 0 where there are none."""
    step = args.columns * size_of(kind)
    away = max(rows, (_AHEAD + step - 1) // step)
    return away * step if last - unit >= (away + rows) * fold else 0


@function
def _ask(address: Any, kind: Any) -> None:
    for line in range(0, LANES * size_of(kind), LINE):
        prefetch(address + line)


@function
def add_deviations(
    args: Any,
    place: Any,
    width: Any,
    ahead: Any,
    center: Any,
    factor: Any,
    sums: Any,
    kind: Any,
    real: Any,
) -> None:
    """Add x * factor - center, and its square, to the two rows of sums, per column.

    Args:
        args: the call.
        place: number of the strip's first value in its tensor.
        width: columns.
        ahead: bytes from a value to what is asked for meanwhile, 0 for nothing.
        center: per column.
        factor: of x.
        sums: `[2, width + LANES]`.
        kind: of the tensors in memory.
        real: of the arithmetic.
    """
    step, number = args.columns * size_of(kind), size_of(real)
    scale = splat(factor, real)
    first, second = sums.ctypes.data, sums.ctypes.data + sums.shape[1] * number
    for start in range(0, width, LANES):
        s, q = load(first + start * number, real), load(second + start * number, real)
        middle = load(center.ctypes.data + start * number, real)
        x = args.x + (place + start) * size_of(kind)
        if start + LANES <= width:
            if ahead:
                for row in range(SUMMED):
                    _ask(x + ahead + row * step, kind)
            v0, v1 = load(x, kind) * scale - middle, load(x + step, kind) * scale - middle
            v2 = load(x + 2 * step, kind) * scale - middle
            v3 = load(x + 3 * step, kind) * scale - middle
            s = s + ((v0 + v1) + (v2 + v3))
            q = multiply_add(v3, v3, multiply_add(v2, v2, multiply_add(v1, v1, multiply_add(v0, v0, q))))
        else:
            fill = middle * splat(1 / factor, real)
            for _ in range(SUMMED):
                deviation = load_part(x, width - start, fill, kind) * scale - middle
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
    kind: Any,
    real: Any,
) -> None:
    """Add dy' and dy' (x - center) rstd to the two rows of sums, per column; arguments as above."""
    step, number, zero = args.columns * size_of(kind), size_of(real), splat(0.0, real)
    row, parameters = given.shape[1] * number, given.ctypes.data
    first, second = sums.ctypes.data, sums.ctypes.data + sums.shape[1] * number
    low, high = splat(args.low_kink, real), splat(args.high_kink, real)
    for start in range(0, width, LANES):
        s, q = load(first + start * number, real), load(second + start * number, real)
        column, count = parameters + start * number, width - start
        center, rstd = load(column + CENTER * row, real), load(column + RSTD * row, real)
        scale, shift = load(column + SCALE * row, real), load(column + SHIFT * row, real)
        offset = (place + start) * size_of(kind)
        x, dy = args.x + offset, args.dy + offset
        residual = args.residual + offset if args.residual else 0
        for _ in range(0, SUMMED, 2):
            if ahead:
                _ask(x + ahead, kind)
                _ask(x + ahead + step, kind)
                _ask(dy + ahead, kind)
                _ask(dy + ahead + step, kind)
            v0, v1 = some(x, count, center, kind) - center, some(x + step, count, center, kind) - center
            z0, z1 = multiply_add(v0, scale, shift), multiply_add(v1, scale, shift)
            if residual:
                z0 = z0 + some(residual, count, zero, kind)
                z1 = z1 + some(residual + step, count, zero, kind)
                residual += 2 * step
            d0 = within(some(dy, count, zero, kind), z0, low, high, real)
            d1 = within(some(dy + step, count, zero, kind), z1, low, high, real)
            s, q = s + (d0 + d1), multiply_add(d1, v1 * rstd, multiply_add(d0, v0 * rstd, q))
            x += 2 * step
            dy += 2 * step
        store(s, first + start * number, real)
        store(q, second + start * number, real)


@function
def _streams(args: Any, address: Any, kind: Any) -> Any:
    """Whether the rows of an output may be streamed to: each begins a cache line."""
    return args.stream and (address | args.columns * size_of(kind)) & (LINE - 1) == 0


@function
def normalize(args: Any, place: Any, width: Any, ahead: Any, given: Any, kind: Any, real: Any) -> None:
    """Write y; arguments as above. The last vector may overlap the one before it: `width` >= LANES."""
    step, number = args.columns * size_of(kind), size_of(real)
    row, parameters = given.shape[1] * number, given.ctypes.data
    low, high = splat(args.low, real), splat(args.high, real)
    streams = _streams(args, args.y, kind)
    for start in range(0, width, LANES):
        if start + LANES > width:
            start, streams = width - LANES, False
        column, offset = parameters + start * number, (place + start) * size_of(kind)
        center, scale = load(column + CENTER * row, real), load(column + SCALE * row, real)
        shift = load(column + SHIFT * row, real)
        x, y = args.x + offset, args.y + offset
        if ahead:
            _ask(x + ahead, kind)
            _ask(x + ahead + step, kind)
        z0 = multiply_add(load(x, kind) - center, scale, shift)
        z1 = multiply_add(load(x + step, kind) - center, scale, shift)
        if args.residual:
            z0 = z0 + load(args.residual + offset, kind)
            z1 = z1 + load(args.residual + offset + step, kind)
        put(bounded(z0, low, high), y, LANES, streams, kind)
        put(bounded(z1, low, high), y + step, LANES, streams, kind)


@function
def differentiate(args: Any, place: Any, width: Any, ahead: Any, given: Any, kind: Any, real: Any) -> None:
    """Write dx, and dresidual where there is a residual; as `normalize`."""
    step, number = args.columns * size_of(kind), size_of(real)
    row, parameters = given.shape[1] * number, given.ctypes.data
    low, high = splat(args.low_kink, real), splat(args.high_kink, real)
    streams = _streams(args, args.dx | args.dresidual, kind)
    for start in range(0, width, LANES):
        if start + LANES > width:
            start, streams = width - LANES, False
        column, offset = parameters + start * number, (place + start) * size_of(kind)
        center, scale = load(column + CENTER * row, real), load(column + SCALE * row, real)
        shift, rstd = load(column + SHIFT * row, real), load(column + RSTD * row, real)
        a, b = load(column + A * row, real), load(column + B * row, real)
        c = load(column + C * row, real)
        x, dy, dx = args.x + offset, args.dy + offset, args.dx + offset
        if ahead:
            _ask(x + ahead, kind)
            _ask(x + ahead + step, kind)
            _ask(dy + ahead, kind)
            _ask(dy + ahead + step, kind)
        v0, v1 = load(x, kind) - center, load(x + step, kind) - center
        z0, z1 = multiply_add(v0, scale, shift), multiply_add(v1, scale, shift)
        if args.residual:
            z0 = z0 + load(args.residual + offset, kind)
            z1 = z1 + load(args.residual + offset + step, kind)
        d0 = within(load(dy, kind), z0, low, high, real)
        d1 = within(load(dy + step, kind), z1, low, high, real)
        if args.dresidual:
            put(d0, args.dresidual + offset, LANES, streams, kind)
            put(d1, args.dresidual + offset + step, LANES, streams, kind)
        put(multiply_add(a, d0, multiply_add(b, v0 * rstd, c)), dx, LANES, streams, kind)
        put(multiply_add(a, d1, multiply_add(b, v1 * rstd, c)), dx + step, LANES, streams, kind)
