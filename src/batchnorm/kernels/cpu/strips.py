"""A strip: some whole rows of a block of columns, for which a column's parameters are loaded once.

All of a row's parameters together do not stay in the first cache. Strips are for calls without a mask and
with bounds as the activation at most (SIMPLE); rows.py does the others, and what is no whole row, row by row.
"""

from __future__ import annotations

from typing import Any

from .access import LINE, load, load_part, prefetch, size_of, store
from .activations import bounded, within
from .llvm import LANES
from .runs import CENTER, RSTD, SCALE, SHIFT, A, B, C, put, some
from .vector import function, multiply_add, splat

STRIP = 8  # rows


@function
def add_deviations(
    packet: Any, place: Any, rows: Any, width: Any, center: Any, factor: Any, sums: Any, kind: Any, real: Any
) -> None:
    """Add x * factor - center, and its square, to the two rows of sums, per column.

    Args:
        packet: the call.
        place: number of the strip's first value in its tensor.
        rows, width: of the strip.
        center: per column.
        factor: of x.
        sums: `[2, width]` at least.
        kind: of the tensors in memory.
        real: of the arithmetic.
    """
    step, number = packet.columns * size_of(kind), size_of(real)
    ahead, scale = STRIP * step, splat(factor, real)
    first, second = sums.ctypes.data, sums.ctypes.data + sums.shape[1] * number
    for start in range(0, width, LANES):
        s, q = load(first + start * number, real), load(second + start * number, real)
        middle = load(center.ctypes.data + start * number, real)
        x = packet.x + (place + start) * size_of(kind)
        if start + LANES <= width:
            for _ in range(rows):
                for line in range(0, LANES * size_of(kind), LINE):
                    prefetch(x + ahead + line)
                deviation = load(x, kind) * scale - middle
                s, q = s + deviation, multiply_add(deviation, deviation, q)
                x += step
        else:
            fill = middle * splat(1 / factor, real)
            for _ in range(rows):
                deviation = load_part(x, width - start, fill, kind) * scale - middle
                s, q = s + deviation, multiply_add(deviation, deviation, q)
                x += step
        store(s, first + start * number, real)
        store(q, second + start * number, real)


@function
def add_gradients(
    packet: Any, place: Any, rows: Any, width: Any, given: Any, sums: Any, kind: Any, real: Any
) -> None:
    """Add dy' and dy' (x - center) rstd to the two rows of sums, per column; arguments as above."""
    step, number, zero = packet.columns * size_of(kind), size_of(real), splat(0.0, real)
    ahead, row, parameters = STRIP * step, given.shape[1] * number, given.ctypes.data
    first, second = sums.ctypes.data, sums.ctypes.data + sums.shape[1] * number
    low, high = splat(packet.low_kink, real), splat(packet.high_kink, real)
    for start in range(0, width, LANES):
        s, q = load(first + start * number, real), load(second + start * number, real)
        column, count = parameters + start * number, min(LANES, width - start)
        center, rstd = load(column + CENTER * row, real), load(column + RSTD * row, real)
        scale, shift = load(column + SCALE * row, real), load(column + SHIFT * row, real)
        offset = (place + start) * size_of(kind)
        x, dy = packet.x + offset, packet.dy + offset
        residual = packet.residual + offset if packet.residual else 0
        for _ in range(rows):
            for line in range(0, LANES * size_of(kind), LINE):
                prefetch(x + ahead + line)
                prefetch(dy + ahead + line)
            centred = some(x, count, center, kind) - center
            z = multiply_add(centred, scale, shift)
            if residual:
                z = z + some(residual, count, zero, kind)
                residual += step
            incoming = within(some(dy, count, zero, kind), z, low, high, real)
            s, q = s + incoming, multiply_add(incoming, centred * rstd, q)
            x += step
            dy += step
        store(s, first + start * number, real)
        store(q, second + start * number, real)


@function
def _streams(packet: Any, address: Any, kind: Any) -> Any:
    """Whether the rows of an output may be streamed to: each begins a line, and a vector fills it."""
    row = packet.columns * size_of(kind)
    return packet.stream and size_of(kind) >= 4 and (address | row) & (LINE - 1) == 0


@function
def normalize(packet: Any, place: Any, rows: Any, width: Any, given: Any, kind: Any, real: Any) -> None:
    """Write y; arguments as above."""
    step, number, zero = packet.columns * size_of(kind), size_of(real), splat(0.0, real)
    row, parameters = given.shape[1] * number, given.ctypes.data
    ahead = STRIP * step if packet.ahead else 0
    streams = _streams(packet, packet.y, kind)
    low, high = splat(packet.low, real), splat(packet.high, real)
    for start in range(0, width, LANES):
        column, count = parameters + start * number, min(LANES, width - start)
        center, scale = load(column + CENTER * row, real), load(column + SCALE * row, real)
        shift = load(column + SHIFT * row, real)
        offset = (place + start) * size_of(kind)
        x, y = packet.x + offset, packet.y + offset
        residual = packet.residual + offset if packet.residual else 0
        for _ in range(rows):
            if ahead:
                prefetch(x + ahead)
            z = multiply_add(some(x, count, center, kind) - center, scale, shift)
            if residual:
                z = z + some(residual, count, zero, kind)
                residual += step
            put(bounded(z, low, high), y, count, streams, kind)
            x += step
            y += step


@function
def differentiate(packet: Any, place: Any, rows: Any, width: Any, given: Any, kind: Any, real: Any) -> None:
    """Write dx, and dresidual where there is a residual; arguments as above."""
    step, number, zero = packet.columns * size_of(kind), size_of(real), splat(0.0, real)
    row, parameters = given.shape[1] * number, given.ctypes.data
    ahead = STRIP * step if packet.ahead else 0
    streams = _streams(packet, packet.dx | packet.dresidual, kind)
    low, high = splat(packet.low_kink, real), splat(packet.high_kink, real)
    for start in range(0, width, LANES):
        column, count = parameters + start * number, min(LANES, width - start)
        center, rstd = load(column + CENTER * row, real), load(column + RSTD * row, real)
        scale, shift = load(column + SCALE * row, real), load(column + SHIFT * row, real)
        a, b, c = (
            load(column + A * row, real),
            load(column + B * row, real),
            load(column + C * row, real),
        )
        offset = (place + start) * size_of(kind)
        x, dy, dx = packet.x + offset, packet.dy + offset, packet.dx + offset
        residual = packet.residual + offset if packet.residual else 0
        dresidual = packet.dresidual + offset if packet.dresidual else 0
        for _ in range(rows):
            if ahead:
                prefetch(x + ahead)
                prefetch(dy + ahead)
            centred = some(x, count, center, kind) - center
            z = multiply_add(centred, scale, shift)
            if residual:
                z = z + some(residual, count, zero, kind)
                residual += step
            incoming = within(some(dy, count, zero, kind), z, low, high, real)
            if dresidual:
                put(incoming, dresidual, count, streams, kind)
                dresidual += step
            found = multiply_add(a, incoming, multiply_add(b, centred * rstd, c))
            put(found, dx, count, streams, kind)
            x += step
            dy += step
            dx += step
