"""Every kernel for CPUs compiled, once, by all cores: `python -m tests.support.kernels`.

Without it each worker of pytest compiles what the others are compiling.
"""

from __future__ import annotations

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from batchnorm.kernels.cpu import compiled


def compile_kernel(name: str, dtype: torch.dtype, simple: bool) -> None:
    """Compile a kernel, or find it on disk."""
    compiled.kernel(name, dtype, simple)


def main() -> None:
    """Let processes, as many as there are cores, take one after the other."""
    kernels = itertools.product(compiled._KERNELS, compiled.KINDS, (False, True))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_kernel, *zip(*kernels, strict=True)))


if __name__ == "__main__":
    main()
