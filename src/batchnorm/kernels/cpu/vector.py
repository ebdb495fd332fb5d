"""Computes with vectors of 16 numbers in Numba's Python, by instructions that Numba does not offer.

Kernels that are bound by memory have to prefetch cache lines and to write past the caches; Numba leaves both
to a compiler that does neither. Written with these vectors, the kernels read like their equations:

    z = multiply_add(load(x, dtype) - center, scale, shift)
    stream(bounded(z, low, high), y, dtype)

A vector is 16 float32, or 16 float64 where the tensors are float64; LLVM maps it to the processor's
registers. An argument `dtype` or `real` is a NumPy scalar type, known when the kernel is compiled
(access.py). Arithmetic is as written: nothing is reassociated, and a product and a sum are fused in
`multiply_add` alone, so that the same expression gives the same bits in every kernel.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, overload, register_model

from .llvm import FLOATING, I32, LANES, call, constant, many, splatted, suffix

# Compiles a function that kernels call. Division by 0 gives infinity or NaN, since no caller of a kernel
# could catch an exception.
function = njit(error_model="numpy")

# The same for a function with one caller: inlined at once, it is compiled once. Numba compiles any other
# function by itself, and again within each of its callers, up to the kernel.
part_of_one = njit(error_model="numpy", inline="always")

# The features of a kernel: see `is_simple`. They are types, so that Numba compiles a kernel for each.
SIMPLE, FULL = np.int8, np.int16


class Variant(NamedTuple):
    """Constants that a kernel is compiled for.

    Attributes:
        dtype: NumPy type of the tensors' values in memory, see access.py.
        real: np.float32 or np.float64, the dtype of the arithmetic.
        features: SIMPLE or FULL.
    """

    dtype: Any
    real: Any
    features: Any


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


def vector_of(dtype: Any) -> Vector:
    """Returns the type of the vector that values of a dtype in memory are loaded into."""
    return DOUBLES if dtype.instance_type == types.float64 else FLOATS


@intrinsic
def is_simple(typingctx: Any, variant: Any) -> Any:
    """Returns whether a kernel is compiled for calls without a mask and with no activation but bounds.

    The answer is a constant: the compiler drops the branches for other calls, which halves its own time too.
    """
    del typingctx
    answer = has_simple_features(variant)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, builder, signature, arguments
        return ir.IntType(1)(answer)

    return types.boolean(variant), code


def has_simple_features(variant: Any) -> bool:
    """Returns whether the features in the Numba type of a `Variant` are SIMPLE."""
    answer: bool = variant.types[variant.fields.index("features")].instance_type == types.int8
    return answer


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
    """Returns a * b + c, rounded once on processors with that instruction; on all others, always twice."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        type_ = arguments[0].type
        return call(builder, f"llvm.fmuladd.{suffix(type_)}", type_, list(arguments))

    return a(a, b, c), code


@intrinsic
def splat(typingctx: Any, value: Any, dtype: Any) -> Any:
    """Returns a vector of 16 times the same number, of the type that values of `dtype` are loaded into."""
    del typingctx
    vector = vector_of(dtype)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = context.cast(builder, arguments[0], signature.args[0], vector.element)
        return splatted(builder, one)

    return vector(value, dtype), code


@intrinsic
def total(typingctx: Any, a: Any) -> Any:
    """Returns the sum of a vector's numbers in float64, by adding one half to the other until one is left."""
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

    choose.__doc__ = f"Returns `yes` where a {order} b, and `no` elsewhere, also where a or b is NaN."
    choose._name = name
    return choose


@intrinsic
def power_of_two(typingctx: Any, exponent: Any) -> Any:
    """Returns 2 to the power of integers between -126 and 127, which are float32."""
    del typingctx

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        whole = builder.fptosi(arguments[0], many(I32))
        bits = builder.shl(builder.add(whole, constant(I32, 127)), constant(I32, 23))
        return builder.bitcast(bits, arguments[0].type)

    return exponent(exponent), code


def _by_lane(name: str) -> Any:
    """Returns an intrinsic that calls a function of the C library for each number; for float64."""

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
