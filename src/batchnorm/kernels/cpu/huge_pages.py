"""Allocates large outputs in huge pages.

A page fault for every 4 KB of fresh memory costs more than the arithmetic.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

_HUGE = 2**21  # bytes of a huge page
_MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Returns Linux's `madvise`, or None on other systems."""
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lambda start, size, advice: int(madvise(start, size, advice))


def empty_like(x: Tensor) -> Tensor:
    """Returns a tensor as `torch.empty_like` does; asks for pages of 2 MB instead of 4 KB for a large one.

    The advice lasts as long as the memory is mapped, and changes only the number of page faults.
    """
    y = torch.empty_like(x)
    size = y.numel() * y.element_size()
    if size >= 2 * _HUGE and (madvise := _madvise()) is not None:
        start = -(-y.data_ptr() // _HUGE) * _HUGE
        end = (y.data_ptr() + size) // _HUGE * _HUGE
        madvise(start, end - start, _MADV_HUGEPAGE)
    return y
