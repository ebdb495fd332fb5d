"""Loads and stores vectors; prefetches cache lines, writes past the caches, and counts tasks atomically.

`dtype` is the NumPy type of values in memory: np.float32, np.float64, np.int16 for float16, or np.uint16 for
bfloat16. Both 16-bit types are loaded as float32. Addresses are integers, in bytes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .llvm import FLOATING, I8, I16, I32, I64, LANES, call, constant, many, splatted, suffix
from .vector import vector_of

LINE = 64  # bytes of a cache line


def _positions(builder: Any, count: Any) -> Any:
    """Returns a mask of one bit per lane, set in lanes below `count`."""
    lanes = ir.Constant(many(I64), list(range(LANES)))
    return builder.icmp_unsigned("<", lanes, splatted(builder, count))


def _address(builder: Any, address: Any, type_: ir.Type) -> Any:
    return builder.inttoptr(address, type_.as_pointer())


def _stored(dtype: Any) -> ir.Type:
    """Returns LLVM's type of values of a dtype in memory."""
    return FLOATING.get(dtype.instance_type, I16)


def _widened(builder: Any, raw: Any, dtype: Any) -> Any:
    if dtype.instance_type == types.int16:
        return builder.fpext(builder.bitcast(raw, many(ir.HalfType())), many(ir.FloatType()))
    if dtype.instance_type == types.uint16:
        bits = builder.shl(builder.zext(raw, many(I32)), constant(I32, 16))
        return builder.bitcast(bits, many(ir.FloatType()))
    return raw


def _narrowed(builder: Any, value: Any, dtype: Any) -> Any:
    """Returns a vector in the type that it has in memory, rounded to nearest, ties to even; NaN stays NaN.

    bfloat16 is rounded by an addition to the bits, which would overflow in a NaN with all bits set. There is
    no such NaN: the last bits of a value that was loaded from 16 bits are 0, and parameters go through
    `kernel_args.plain`.
    """
    if dtype.instance_type == types.int16:
        return builder.bitcast(builder.fptrunc(value, many(ir.HalfType())), many(I16))
    if dtype.instance_type == types.uint16:
        bits = builder.bitcast(value, many(I32))
        odd = builder.and_(builder.lshr(bits, constant(I32, 16)), constant(I32, 1))
        rounded = builder.add(bits, builder.add(odd, constant(I32, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, constant(I32, 16)), many(I16))
    return value


def _size(type_: ir.Type) -> int:
    return {ir.DoubleType(): 8, ir.FloatType(): 4}.get(type_, 2)


@intrinsic
def size_of(typingctx: Any, dtype: Any) -> Any:
    """Returns the bytes of a value in memory."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, builder, signature, arguments
        return I64(_size(_stored(dtype)))

    return types.intp(dtype), code


@intrinsic
def load(typingctx: Any, address: Any, dtype: Any) -> Any:
    """Returns the 16 values at an address."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        type_ = _stored(dtype)
        raw = builder.load(_address(builder, arguments[0], many(type_)))
        raw.align = _size(type_)
        return _widened(builder, raw, dtype)

    return vector_of(dtype)(address, dtype), code


@intrinsic
def load_part(typingctx: Any, address: Any, count: Any, fill: Any, dtype: Any) -> Any:
    """Returns the first `count` values at an address, with `fill` in the other lanes."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        type_ = _stored(dtype)
        lanes = _positions(builder, arguments[1])
        pointer = _address(builder, arguments[0], many(type_))
        nothing = ir.Constant(many(type_), None)
        raw = call(
            builder,
            f"llvm.masked.load.{suffix(nothing.type)}.p0",
            many(type_),
            [pointer, I32(_size(type_)), lanes, nothing],
        )
        return builder.select(lanes, _widened(builder, raw, dtype), arguments[2])

    return vector_of(dtype)(address, count, fill, dtype), code


@intrinsic
def store(typingctx: Any, values: Any, address: Any, dtype: Any) -> Any:
    """Writes a vector's 16 values to an address."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature
        raw = _narrowed(builder, arguments[0], dtype)
        builder.store(raw, _address(builder, arguments[1], raw.type), align=_size(_stored(dtype)))
        return context.get_dummy_value()

    return types.void(values, address, dtype), code


@intrinsic
def store_part(typingctx: Any, values: Any, address: Any, count: Any, dtype: Any) -> Any:
    """Writes a vector's first `count` values to an address."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature
        raw = _narrowed(builder, arguments[0], dtype)
        pointer = _address(builder, arguments[1], raw.type)
        call(
            builder,
            f"llvm.masked.store.{suffix(raw.type)}.p0",
            ir.VoidType(),
            [raw, pointer, I32(_size(_stored(dtype))), _positions(builder, arguments[2])],
        )
        return context.get_dummy_value()

    return types.void(values, address, count, dtype), code


@intrinsic
def stream(typingctx: Any, values: Any, address: Any, dtype: Any) -> Any:
    """Writes a vector past the caches, so that the processor does not read its cache line first.

    The address must be a multiple of the vector's size, or of LINE if that is less: any other crashes the
    process.
    """
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature
        raw = _narrowed(builder, arguments[0], dtype)
        size = min(LINE, LANES * _size(_stored(dtype)))
        written = builder.store(raw, _address(builder, arguments[1], raw.type), align=size)
        written.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
        return context.get_dummy_value()

    return types.void(values, address, dtype), code


@intrinsic
def keep_valid(typingctx: Any, values: Any, mask: Any, count: Any, fill: Any) -> Any:
    """Returns `values` in lanes whose byte at `mask` is not 0, else `fill`; reads `count` bytes."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        values, mask, count, fill = arguments
        pointer = _address(builder, mask, many(I8))
        raw = call(
            builder,
            f"llvm.masked.load.{suffix(many(I8))}.p0",
            many(I8),
            [pointer, I32(1), _positions(builder, count), ir.Constant(many(I8), None)],
        )
        valid = builder.icmp_unsigned("!=", raw, ir.Constant(many(I8), None))
        return builder.select(valid, values, fill)

    return values(values, mask, count, fill), code


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Prefetches the cache line at an address, which need not be one of the process's memory."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature
        pointer = _address(builder, arguments[0], I8)
        for_reading, into_second_level, data = I32(0), I32(2), I32(1)
        call(
            builder,
            "llvm.prefetch.p0",
            ir.VoidType(),
            [pointer, for_reading, into_second_level, data],
        )
        return context.get_dummy_value()

    return types.void(address), code


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """Returns an address as a pointer, which `numba.carray` takes."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(address), code


@intrinsic
def finished(typingctx: Any, address: Any) -> Any:
    """Adds 1 to the integer at an address, and returns the integer before that.

    A thread that reads the sum by `number_finished` also sees all that this thread has written before.
    """
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.atomic_rmw("add", _address(builder, arguments[0], I64), I64(1), "acq_rel")

    return types.int64(address), code


@intrinsic
def number_finished(typingctx: Any, address: Any) -> Any:
    """Returns the integer at an address, to which `finished` adds."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.load_atomic(_address(builder, arguments[0], I64), "acquire", align=8)

    return types.intp(address), code


@intrinsic
def take_number(typingctx: Any, address: Any) -> Any:
    """Adds 1 to the integer at an address, and returns the one before; no two threads get the same."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.atomic_rmw("add", _address(builder, arguments[0], I64), I64(1), "monotonic")

    return types.intp(address), code
