"""Tolerances: the distance of a result from the reference, by the dtype that it is stored in, with reasons.

A value passes if

    |actual - expected| <= rounding * |expected| + bound * (1 + max |expected|)

The second term is the metric of the accuracy contract; the first is the one rounding to a narrow dtype that
a result may go through when it is stored, and belongs to that value alone. Inputs are rounded to the dtype
before the reference sees them, and every engine computes in float32 or wider, so nothing else of the narrow
dtype's coarseness may show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """One row of the table.

    Attributes:
        bound: of |actual - expected| / (1 + max |expected|).
        rounding: unit roundoff of the stored value, relative to that value; 0 where `bound` covers it.
        reason: where the two numbers come from.
    """

    bound: float
    rounding: float
    reason: str


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(
        1e-12,
        0.0,
        "At |mean|/std = 1e3, the largest of the grid, a mean rounded to float64 is off by up to 1e3 * 2^-53 "
        "= 1.1e-13 std, in the engine and in the reference; 1e-12 leaves a factor 4 for the sums.",
    ),
    torch.float32: Tolerance(
        2e-6,
        0.0,
        "The accuracy contract: about 17 * 2^-23 for |mean|/std up to 1e6, dx in units of 1/std. Storing the "
        "result takes 2^-24 of it.",
    ),
    torch.bfloat16: Tolerance(
        2e-6,
        2.0**-8,
        "8 significant bits, so rounding to nearest is off by at most 2^-8 of the value, once, when the "
        "float32 result is stored. The float32 result itself keeps float32's bound.",
    ),
    torch.float16: Tolerance(
        2e-6,
        2.0**-11,
        "11 significant bits, so 2^-11 of the value, once; values below 2^-14 are spaced 2^-24 apart, and "
        "half of that, 3e-8, is within float32's bound.",
    ),
}
