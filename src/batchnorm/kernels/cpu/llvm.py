"""Builds types, constants and calls in LLVM's intermediate representation, for vector.py and access.py."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

LANES = 16  # numbers in a vector
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOATING = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}


def many(type_: ir.Type) -> ir.VectorType:
    """Returns the type of a vector of LANES values."""
    return ir.VectorType(type_, LANES)


def constant(type_: ir.Type, value: Any) -> ir.Constant:
    """Returns a vector with a constant in all lanes."""
    return ir.Constant(many(type_), [value] * LANES)


def splatted(builder: Any, value: Any) -> Any:
    """Returns a vector with a value in all lanes."""
    one = builder.insert_element(ir.Constant(many(value.type), ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, ir.Constant(many(value.type), ir.Undefined), constant(I32, 0))


def call(builder: Any, name: str, result: ir.Type, arguments: list[Any]) -> Any:
    """Returns a call of one of LLVM's own functions, by its full name."""
    known = builder.module.globals.get(name)
    type_ = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(known or ir.Function(builder.module, type_, name), arguments)


def suffix(vector: Any) -> str:
    """Returns the end of the names of LLVM's functions on a vector type."""
    element = vector.element
    name = {ir.FloatType(): "f32", ir.DoubleType(): "f64"}.get(element)
    return f"v{LANES}{name or f'i{element.width}'}"
