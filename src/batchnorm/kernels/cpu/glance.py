"""Of rows: a glance at the first values of a block, around whose means the others are summed."""

from __future__ import annotations

from typing import Any

import numpy as np

from .access import load, size_of, store
from .columns import columns_in, gather, is_in, place_of, units_in_a_row, valid_values
from .elementwise import some
from .llvm import LANES
from .row_tiles import SUMMED
from .statistics import rounded
from .vector import function, part_of_one, splat, total
from .workspace import MIDDLES, SUMS


@function
def _add(args: Any, place: Any, size: Any, factor: Any, sums: Any, kind: Any, real: Any) -> None:
    """Add x * factor of a row of some columns to the sums at an address, which has room for LANES more."""
    zero, scale = splat(0.0, real), splat(factor, real)
    for start in range(0, size, LANES):
        address, here = args.x + (place + start) * size_of(kind), sums + start * size_of(real)
        store(load(here, real) + some(address, size - start, zero, kind) * scale, here, real)


@part_of_one
def glance(
    args: Any,
    unit: Any,
    last: Any,
    column: Any,
    end: Any,
    factor: Any,
    by_column: Any,
    by_channel: Any,
    kind: Any,
    real: Any,
    how: Any,
) -> None:
    """Set MIDDLES to a guess of the means of x * factor.

    Of a few rows; or, where planes are short, of a vector of each, as no sums are kept per column then.
    """
    sums, middles, size = by_column[SUMS], by_channel[MIDDLES], args.positions
    if size > 1:  # and no mask, as partition.py has it
        beside, zero, scale = min(size, LANES), splat(0.0, real), splat(factor, real)
        stop = min(last, unit + (LANES + size - 1) // size)
        for channel in range(middles.size):
            found = zero
            for row in range(unit, stop):
                place = place_of(args, row, column + channel * size)
                found = found + some(args.x + place * size_of(kind), beside, zero, kind) * scale
            middles[channel] = total(found)
        share = 1 / np.float64((stop - unit) * beside)
    else:
        fold = units_in_a_row(args)
        stop = min(last, unit + SUMMED * fold)
        for place in range(sums.size):
            sums[place] = 0
        for row in range(unit, stop, fold):
            if is_in(args, row, how):
                width = columns_in(args, row, last, column, end)
                _add(args, place_of(args, row, column), width, factor, sums.ctypes.data, kind, real)
        gather(sums, args, column, end - column, middles, real)
        share = 1 / max(valid_values(args, unit, stop, how), 1.0)
    for channel in range(middles.size):
        middles[channel] = rounded(middles[channel] * share, real)
