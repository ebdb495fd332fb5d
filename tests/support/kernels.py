"""Every kernel for CPUs compiled, once, by all cores: `python -m tests.support.kernels`.

Without it each worker of pytest compiles what the others are compiling.
"""

from __future__ import annotations

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from batchnorm.kernels.cpu import jit


def compile_for(dtype: torch.dtype) -> None:
    """Compile the kernels of a dtype, or find them on disk: they share what they are made of."""
    gc.disable()  # the compiler makes much that stays, through which the collector would go again and again
    for name in jit._KERNELS:
        for simple in (False, True):
            jit.kernel(name, dtype, simple)


def main() -> None:
    """Let processes, as many as there are cores, take one dtype after the other."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_for, jit.DTYPES))


if __name__ == "__main__":
    main()
