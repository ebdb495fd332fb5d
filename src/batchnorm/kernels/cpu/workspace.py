"""A thread's workspace to compute in, of rows: asked for once, as small tasks take less time than that.

Two tables: of numbers per column, with LANES more behind each row; and per channel, in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .access import size_of
from .columns import layout
from .elementwise import PARAMETERS
from .kernel_args import table
from .llvm import LANES
from .vector import function

CENTERS, SUMS, GIVEN = 0, 1, 3  # rows of the first; the sums are two
FOUND, MORE, MIDDLES, REST = 0, 2, 4, 7  # of the second: pairs first; parameters lie over all but the last
PER_COLUMN, PER_CHANNEL = GIVEN + PARAMETERS, 8  # rows of each


@function
def tables(args: Any, workspace: Any, column: Any, end: Any, real: Any) -> Any:
    """Return the two tables, for a block of columns."""
    wide = end - column + LANES
    _, channels, _, _, _ = layout(args, column, end - column)
    by_column = table(workspace, 0, PER_COLUMN, wide, real)
    return by_column, table(workspace, PER_COLUMN * wide * size_of(real), PER_CHANNEL, channels, np.float64)
