"""Vectors of 16 numbers in Numba's Python, and the few instructions that it has no word for.

Kernels that are bound by memory have to say when a line is fetched, and that one is written past the caches;
Numba leaves both to a compiler that does neither. Written with these vectors they read like their equations:

    z = multiply_add(load(x, kind) - high, scale, shift)
    stream(clamp(z, low, high), y, kind)

A vector is 16 float32, or 16 float64 where the tensors are float64; LLVM makes of it what the processor has.
`kind` says what a vector's numbers are in memory (access.py). Arithmetic is as written: nothing is
reassociated, and a product and a sum are fused in `multiply_add` alone, so that the same expression gives the
same bits wherever it stands.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, overload, register_model

from .llvm import FLOATING, I32, LANES, call, constant, many, splatted, suffix

# What kernels are made of. Division by 0 gives infinity or NaN: an exception in a task would reach nobody.
function = njit(error_model="numpy")

# For what has one caller only: the compiler goes through a function once by itself, and once more within each
# that calls it, up to the kernel.
part_of_one = njit(error_model="numpy", inline="always")

# How a kernel is compiled: see `is_simple`. Two types, so that Numba compiles one for each.
SIMPLE, FULL = np.int8, np.int16


class Vector(types.Type):
    """Type of a vector of LANES numbers of one floating type."""

    def __init__(self, element: Any) -> None:
        self.element = element
        super().__init__(name=f"Vector({element})")


FLOATS, DOUBLES = Vector(types.float32), Vector(types.float64)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(FLOATING[fe_type.element], LANES))


def vector_of(kind: Any) -> Vector:
    """The vector that values of a kind in memory become."""
    return DOUBLES if kind.instance_type == types.float64 else FLOATS


@intrinsic
def is_simple(typingctx: Any, how: Any) -> Any:
    """Whether a kernel is compiled for calls without a mask, and at most bounds as an activation.

    The compiler knows the answer, and leaves out what is not asked for: half of the time, of its own too.
    """
    del typingctx
    answer = how.instance_type == types.int8

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, builder, signature, arguments
        return ir.IntType(1)(answer)

    return types.boolean(how), code


# Arithmetic


def _binary(symbol: Any, instruction: str) -> None:
    @intrinsic
    def apply(typingctx: Any, a: Any, b: Any) -> Any:
        del typingctx, b

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            del context, signature
            return getattr(builder, instruction)(*arguments)

        return a(a, a), code

    @overload(symbol)
    def apply_to_vectors(a: Any, b: Any) -> Any:
        def implementation(a: Any, b: Any) -> Any:
            return apply(a, b)

        return implementation if isinstance(a, Vector) and a == b else None


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _binary(_symbol, _instruction)


@intrinsic
def multiply_add(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once where the processor has that instruction: always, or never."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        kind = arguments[0].type
        return call(builder, f"llvm.fmuladd.{suffix(kind)}", kind, list(arguments))

    return a(a, b, c), code


@intrinsic
def splat(typingctx: Any, value: Any, kind: Any) -> Any:
    """Return a vector of one number, of the type that values of `kind` become."""
    del typingctx
    vector = vector_of(kind)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = context.cast(builder, arguments[0], signature.args[0], vector.element)
        return splatted(builder, one)

    return vector(value, kind), code


@intrinsic
def total(typingctx: Any, a: Any) -> Any:
    """Return the sum of a vector's numbers in float64: halves are added to each other, again and again."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        value, width = arguments[0], LANES
        if value.type.element != ir.DoubleType():
            value = builder.fpext(value, many(ir.DoubleType()))
        while width > 1:
            width //= 2
            halves = (
                ir.Constant(ir.VectorType(I32, width), list(range(start, start + width)))
                for start in (0, width)
            )
            low, high = (
                builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), half) for half in halves
            )
            value = builder.fadd(low, high)
        return builder.extract_element(value, I32(0))

    return types.float64(a), code


def _compare(name: str, order: str) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        a, b, yes, no = arguments
        return builder.select(builder.fcmp_ordered(order, a, b), yes, no)

    @intrinsic
    def choose(typingctx: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
        del typingctx
        return a(a, b, yes, no), code

    choose.__doc__ = f"Return `yes` where a {order} b, else `no`; no where either is NaN."
    choose._name = name
    return choose


@intrinsic
def power_of_two(typingctx: Any, exponent: Any) -> Any:
    """Return 2 to whole numbers between -126 and 127, float32."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        whole = builder.fptosi(arguments[0], many(I32))
        bits = builder.shl(builder.add(whole, constant(I32, 127)), constant(I32, 23))
        return builder.bitcast(bits, arguments[0].type)

    return exponent(exponent), code


def _by_lane(name: str) -> Any:
    """A function of the C library, number by number: for float64, where exactness counts before speed."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        found = ir.Constant(arguments[0].type, ir.Undefined)
        for lane in range(LANES):
            one = builder.extract_element(arguments[0], I32(lane))
            found = builder.insert_element(found, call(builder, name, ir.DoubleType(), [one]), I32(lane))
        return found

    @intrinsic
    def apply(typingctx: Any, values: Any) -> Any:
        del typingctx
        return values(values), code

    return apply


exp_by_lane, erf_by_lane = _by_lane("exp"), _by_lane("erf")

where_less = _compare("where_less", "<")
where_not_more = _compare("where_not_more", "<=")
