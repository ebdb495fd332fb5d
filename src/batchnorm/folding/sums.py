"""The terms of a sum that a forward computes in several additions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic

from .flow import Layer, Sum, Value


@dataclass(frozen=True)
class Term(Generic[Layer]):
    """One of the values that are added.

    Attributes:
        value: as its maker gave it.
        sign: 1 or -1.
        is_alone: whether nothing but the sum reads it.
        is_written: whether the sum is written over it.
    """

    value: Value[Layer]
    sign: int
    is_alone: bool
    is_written: bool


def whole_sum(value: Value[Layer]) -> list[Term[Layer]]:
    """Return the terms of the largest sum that a value is part of, in their order; none if it is in no sum.

    Partial sums that something else reads too end it.
    """
    top = None
    while len(value.readers) == 1:
        (reader,) = value.readers
        if isinstance(reader.joins, Sum):
            top = reader.gives[0]
        elif reader.axes != "same":
            break
        value = reader.gives[0]
    return [] if top is None else list(_terms(top, 1, is_alone=True, is_written=False))


def _terms(value: Value[Layer], sign: int, *, is_alone: bool, is_written: bool) -> Iterator[Term[Layer]]:
    maker = value.maker
    if maker is not None and maker.axes == "same":
        first = maker.reads[0]
        alone = is_alone and len(first.readers) == 1
        yield from _terms(first, sign, is_alone=alone, is_written=is_written)
    elif maker is not None and isinstance(maker.joins, Sum) and is_alone:
        for number, (part, own) in enumerate(zip(maker.reads, maker.joins.signs, strict=True)):
            written = maker.joins.in_place and not number
            alone = len(part.readers) == 1
            yield from _terms(
                part, sign * own, is_alone=alone, is_written=written or (is_written and not number)
            )
    else:
        yield Term(value, sign, is_alone, is_written)
