"""Vectors from memory and to it, and how to say when a line is fetched and what is written past the caches.

`kind` says what lies in memory: np.float32 and np.float64 are themselves; np.int16 stands for float16 and
np.uint16 for bfloat16, which become float32 on the way. Addresses are integers, in bytes.
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
    """The lanes below `count`, as bits."""
    lanes = ir.Constant(many(I64), list(range(LANES)))
    return builder.icmp_unsigned("<", lanes, splatted(builder, count))


def _address(builder: Any, address: Any, type_: ir.Type) -> Any:
    return builder.inttoptr(address, type_.as_pointer())


def _stored(kind: Any) -> ir.Type:
    """LLVM's type of values of a kind in memory."""
    return FLOATING.get(kind.instance_type, I16)


def _widened(builder: Any, raw: Any, kind: Any) -> Any:
    if kind.instance_type == types.int16:
        return builder.fpext(builder.bitcast(raw, many(ir.HalfType())), many(ir.FloatType()))
    if kind.instance_type == types.uint16:
        bits = builder.shl(builder.zext(raw, many(I32)), constant(I32, 16))
        return builder.bitcast(bits, many(ir.FloatType()))
    return raw


def _narrowed(builder: Any, value: Any, kind: Any) -> Any:
    """Rounded to nearest, ties to even, as everywhere; NaN stays NaN.

    To bfloat16 that is an addition to the bits, which would carry over in a NaN whose bits are all set. None
    comes here: in values that were 16-bit the last bits are 0, and parameters are `kernel_args.plain`.
    """
    if kind.instance_type == types.int16:
        return builder.bitcast(builder.fptrunc(value, many(ir.HalfType())), many(I16))
    if kind.instance_type == types.uint16:
        bits = builder.bitcast(value, many(I32))
        odd = builder.and_(builder.lshr(bits, constant(I32, 16)), constant(I32, 1))
        rounded = builder.add(bits, builder.add(odd, constant(I32, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, constant(I32, 16)), many(I16))
    return value


def _size(type_: ir.Type) -> int:
    return {ir.DoubleType(): 8, ir.FloatType(): 4}.get(type_, 2)


@intrinsic
def size_of(typingctx: Any, kind: Any) -> Any:
    """Return the bytes of a value in memory."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, builder, signature, arguments
        return I64(_size(_stored(kind)))

    return types.intp(kind), code


@intrinsic
def load(typingctx: Any, address: Any, kind: Any) -> Any:
    """Return the 16 values at an address."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        type_ = _stored(kind)
        raw = builder.load(_address(builder, arguments[0], many(type_)))
        raw.align = _size(type_)
        return _widened(builder, raw, kind)

    return vector_of(kind)(address, kind), code


@intrinsic
def load_part(typingctx: Any, address: Any, count: Any, fill: Any, kind: Any) -> Any:
    """Return the first `count` values at an address, and lanes of `fill` behind them."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        type_ = _stored(kind)
        lanes = _positions(builder, arguments[1])
        pointer = _address(builder, arguments[0], many(type_))
        nothing = ir.Constant(many(type_), None)
        raw = call(
            builder,
            f"llvm.masked.load.{suffix(nothing.type)}.p0",
            many(type_),
            [pointer, I32(_size(type_)), lanes, nothing],
        )
        return builder.select(lanes, _widened(builder, raw, kind), arguments[2])

    return vector_of(kind)(address, count, fill, kind), code


@intrinsic
def store(typingctx: Any, values: Any, address: Any, kind: Any) -> Any:
    """Write a vector's 16 values to an address."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature
        raw = _narrowed(builder, arguments[0], kind)
        builder.store(raw, _address(builder, arguments[1], raw.type), align=_size(_stored(kind)))
        return context.get_dummy_value()

    return types.void(values, address, kind), code


@intrinsic
def store_part(typingctx: Any, values: Any, address: Any, count: Any, kind: Any) -> Any:
    """Write a vector's first `count` values to an address."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature
        raw = _narrowed(builder, arguments[0], kind)
        pointer = _address(builder, arguments[1], raw.type)
        call(
            builder,
            f"llvm.masked.store.{suffix(raw.type)}.p0",
            ir.VoidType(),
            [raw, pointer, I32(_size(_stored(kind))), _positions(builder, arguments[2])],
        )
        return context.get_dummy_value()

    return types.void(values, address, count, kind), code


@intrinsic
def stream(typingctx: Any, values: Any, address: Any, kind: Any) -> Any:
    """Write a vector past the caches, which spares reading its line first.

    The address must be a multiple of the vector's size, or of LINE: anything else crashes the process.
    """
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature
        raw = _narrowed(builder, arguments[0], kind)
        size = min(LINE, LANES * _size(_stored(kind)))
        written = builder.store(raw, _address(builder, arguments[1], raw.type), align=size)
        written.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
        return context.get_dummy_value()

    return types.void(values, address, kind), code


@intrinsic
def keep_valid(typingctx: Any, values: Any, mask: Any, count: Any, fill: Any) -> Any:
    """Return `values` where the bytes at `mask`, of which `count` may be read, are not 0, and else `fill`."""
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
    """Ask for the cache line at an address; it may lie past the end of anything."""
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
    """Return an address as a pointer, of which `numba.carray` makes an array."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(address), code


@intrinsic
def finished(typingctx: Any, address: Any) -> Any:
    """Add 1 to the whole number at an address: whoever reads it there sees all that was written before.

    Returns the number as it was.
    """
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.atomic_rmw("add", _address(builder, arguments[0], I64), I64(1), "acq_rel")

    return types.int64(address), code


@intrinsic
def number_finished(typingctx: Any, address: Any) -> Any:
    """Return the whole number at an address, to which `finished` adds."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.load_atomic(_address(builder, arguments[0], I64), "acquire", align=8)

    return types.intp(address), code


@intrinsic
def take_number(typingctx: Any, address: Any) -> Any:
    """Return the whole number at an address and add 1 to it, in one step: no two threads get the same."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.atomic_rmw("add", _address(builder, arguments[0], I64), I64(1), "monotonic")

    return types.intp(address), code
