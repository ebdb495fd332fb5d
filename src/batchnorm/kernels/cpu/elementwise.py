"""Computes y from x, and dx from dy, over a run of values that lie side by side.

Parameters are per channel. In a run of one channel a parameter is one vector, the same at every step; in a
run across channels it is a number for each value. Both are read from an array, with a stride of 0 or 1.
"""

from __future__ import annotations

from typing import Any

from .access import LINE, keep_valid, load, load_part, size_of, store, store_part, stream
from .activations import CLAMP, IDENTITY, activated_if_full, bounded, through_if_full, within
from .llvm import LANES
from .vector import function, is_simple, multiply_add, splat

# Rows of the array of parameters: those of the forward and the backward, then those of the backward alone.
CENTER, SCALE, SHIFT = 0, 1, 2  # z = (x - center) * scale + shift
RSTD, A, B, C = 3, 4, 5, 6  # dx = a dy' + b (x - center) rstd + c
PARAMETERS = 7


@function
def fill(given: Any, row: Any, value: Any, real: Any) -> None:
    """Sets a parameter of a run of one channel."""
    store(splat(value, real), given.ctypes.data + row * given.shape[1] * size_of(real), real)


@function
def is_bounds(args: Any, variant: Any) -> Any:
    """Returns whether the activation is none, or has bounds only: these two have a faster loop."""
    return is_simple(variant) or args.activation == IDENTITY or args.activation == CLAMP


@function
def some(address: Any, count: Any, fill: Any, dtype: Any) -> Any:
    """Returns the first `count` values at an address, up to LANES, with `fill` in the other lanes."""
    if count >= LANES:
        return load(address, dtype)
    return load_part(address, count, fill, dtype)


@function
def put(values: Any, address: Any, count: Any, streams: Any, dtype: Any) -> Any:
    """Writes the first `count` values, up to LANES; past the caches if `streams`, to an aligned address."""
    if count < LANES:
        store_part(values, address, count, dtype)
    elif streams:
        stream(values, address, dtype)
    else:
        store(values, address, dtype)


@function
def clear_run(tensor: Any, at: Any, size: Any, dtype: Any) -> None:
    """Writes zeros to `size` values of the tensor at an address, from index `at` on."""
    address = tensor + at * size_of(dtype)
    for start in range(0, size, LANES):
        put(splat(0.0, dtype), address + start * size_of(dtype), min(LANES, size - start), False, dtype)


@function
def _until_aligned(address: Any, size: Any, streams: Any, dtype: Any) -> Any:
    """Returns the size of a run's first step: up to an aligned address if `streams`, else a whole vector."""
    bytes_ = size_of(dtype)
    vector = min(LINE, LANES * bytes_)
    before = (-address & (vector - 1)) // bytes_
    if not streams or before == 0:
        return min(LANES, size)
    return min(before, size)


@function
def incoming(
    args: Any,
    at: Any,
    count: Any,
    centred: Any,
    scale: Any,
    shift: Any,
    low: Any,
    high: Any,
    variant: Any,
) -> Any:
    """Returns dy' = dy * activation'(z), with 0 in the lanes from `count` on.

    Args:
        args: the call's arguments.
        at: index of the first value in its tensor.
        count: number of values, up to LANES.
        centred: x - center.
        scale, shift: parameters of z.
        low, high: the bounds of z outside of which an activation with bounds has a derivative of 0.
        variant: see `vector.Variant`.
    """
    dtype, real = variant.dtype, variant.real
    size = size_of(dtype)
    zero = splat(0.0, real)
    dy = some(args.dy + at * size, count, zero, dtype)
    if args.activation == IDENTITY:
        return dy
    z = multiply_add(centred, scale, shift)
    if args.residual:
        z = z + some(args.residual + at * size, count, zero, dtype)
    return through_if_full(dy, z, args.activation, low, high, variant)


@function
def normalize_run(args: Any, at: Any, size: Any, mask: Any, given: Any, stride: Any, variant: Any) -> Any:
    """Writes y of a run.

    Args:
        args: the call's arguments.
        at: index of the run's first value in its tensor.
        size: number of values.
        mask: address of a byte per value; 0 if there is no mask.
        given: parameters, `[PARAMETERS, LANES]` for a stride of 0, or `[PARAMETERS, size + LANES]` at least.
        stride: 0 where the run is of one channel, 1 where it is across channels.
        variant: see `vector.Variant`.
    """
    dtype, real = variant.dtype, variant.real
    bytes_, number = size_of(dtype), size_of(real)
    row, parameters = given.shape[1] * number, given.ctypes.data
    x, y = args.x + at * bytes_, args.y + at * bytes_
    residual, streams = args.residual + at * bytes_ if args.residual else 0, args.stream
    low, high, zero = splat(args.low, real), splat(args.high, real), splat(0.0, real)
    the_center, the_scale = load(parameters, real), load(parameters + SCALE * row, real)
    the_shift = load(parameters + SHIFT * row, real)
    bounds = is_bounds(args, variant)
    done, count = 0, _until_aligned(y, size, streams, dtype)
    while done < size:
        while bounds and stride == 0 and count == LANES and done + LANES <= size:
            z = multiply_add(load(x + done * bytes_, dtype) - the_center, the_scale, the_shift)
            if residual:
                z = z + load(residual + done * bytes_, dtype)
            z = bounded(z, low, high)
            if not is_simple(variant) and mask:
                z = keep_valid(z, mask + done, LANES, zero)
            if streams:
                stream(z, y + done * bytes_, dtype)
            else:
                store(z, y + done * bytes_, dtype)
            done += LANES
        count = min(count, size - done)
        if count > 0:
            place = parameters + done * stride * number
            center = load(place, real)
            centred = some(x + done * bytes_, count, center, dtype) - center
            z = multiply_add(centred, load(place + SCALE * row, real), load(place + SHIFT * row, real))
            if residual:
                z = z + some(residual + done * bytes_, count, zero, dtype)
            z = activated_if_full(z, args.activation, low, high, variant)
            if not is_simple(variant) and mask:
                z = keep_valid(z, mask + done, count, zero)
            put(z, y + done * bytes_, count, streams, dtype)
        done += count
        count = LANES


@function
def differentiate_run(args: Any, at: Any, size: Any, mask: Any, given: Any, stride: Any, variant: Any) -> Any:
    """Writes dx, and dresidual where there is a residual, of a run; arguments as of `normalize_run`."""
    dtype, real = variant.dtype, variant.real
    bytes_, number = size_of(dtype), size_of(real)
    row, parameters = given.shape[1] * number, given.ctypes.data
    x, dx = args.x + at * bytes_, args.dx + at * bytes_
    residual = args.residual + at * bytes_ if args.residual else 0
    dresidual = args.dresidual + at * bytes_ if args.dresidual else 0
    streams = args.stream and (not dresidual or (dx ^ dresidual) & (LINE - 1) == 0)
    low, high, zero = splat(args.low_kink, real), splat(args.high_kink, real), splat(0.0, real)
    the_center, the_scale = load(parameters, real), load(parameters + SCALE * row, real)
    the_shift, the_a = load(parameters + SHIFT * row, real), load(parameters + A * row, real)
    the_b, the_c = load(parameters + B * row, real), load(parameters + C * row, real)
    the_rstd = load(parameters + RSTD * row, real)
    bounds = is_bounds(args, variant)
    done, count = 0, _until_aligned(dx, size, streams, dtype)
    while done < size:
        while bounds and stride == 0 and count == LANES and done + LANES <= size:
            centred = load(x + done * bytes_, dtype) - the_center
            z = multiply_add(centred, the_scale, the_shift)
            if residual:
                z = z + load(residual + done * bytes_, dtype)
            dy = within(load(args.dy + (at + done) * bytes_, dtype), z, low, high, real)
            found = multiply_add(the_a, dy, multiply_add(the_b, centred * the_rstd, the_c))
            if not is_simple(variant) and mask:
                dy = keep_valid(dy, mask + done, LANES, zero)
                found = keep_valid(found, mask + done, LANES, zero)
            if dresidual:
                if streams:
                    stream(dy, dresidual + done * bytes_, dtype)
                else:
                    store(dy, dresidual + done * bytes_, dtype)
            if streams:
                stream(found, dx + done * bytes_, dtype)
            else:
                store(found, dx + done * bytes_, dtype)
            done += LANES
        count = min(count, size - done)
        if count > 0:
            place = parameters + done * stride * number
            center = load(place, real)
            centred = some(x + done * bytes_, count, center, dtype) - center
            scale, shift = load(place + SCALE * row, real), load(place + SHIFT * row, real)
            dy = incoming(args, at + done, count, centred, scale, shift, low, high, variant)
            a, b = load(place + A * row, real), load(place + B * row, real)
            xhat = centred * load(place + RSTD * row, real)
            found = multiply_add(a, dy, multiply_add(b, xhat, load(place + C * row, real)))
            if not is_simple(variant) and mask:
                dy = keep_valid(dy, mask + done, count, zero)
                found = keep_valid(found, mask + done, count, zero)
            if dresidual:
                put(dy, dresidual + done * bytes_, count, False, dtype)
            put(found, dx + done * bytes_, count, streams, dtype)
        done += count
        count = LANES
