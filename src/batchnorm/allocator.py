"""Memory that the process keeps: `batchnorm.reuse_memory`."""

from __future__ import annotations

import ctypes
import platform
import warnings

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def reuse_memory() -> bool:
    """Have the process keep the large blocks of memory that it frees, and use them again.

    By default glibc returns a large block to the system as soon as it is freed, and asks for a new one at the
    next step, of which the system clears every page on first use: for the outputs of a network's layers that
    may cost more than computing them. After this call, blocks of any size stay with the process. It holds for
    all of the process and to its end, whatever library allocates; call it once, before training.

    The price is memory: the process keeps its peak, and more where sizes differ from step to step (half as
    much again was seen). Numbers do not change.

    Returns:
        Whether it took effect. It does on Linux with glibc.

    Warns:
        UserWarning: where it cannot, and why.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    library, _ = platform.libc_ver()
    if library != "glibc":
        found = library or platform.system()
        warnings.warn(
            f"reuse_memory does nothing here: it sets options of glibc's allocator, and this is {found}",
            UserWarning,
            stacklevel=2,
        )
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(option, _LARGEST) for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    return taken == [1, 1]
