"""Every kernel for CPUs compiled, once, by all cores: `python -m tests.support.kernels`.

Without it each worker of pytest compiles what the others are compiling.
"""

from __future__ import annotations

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from batchnorm.kernels.cpu import compiled


def compile_for(dtype: torch.dtype, simple: bool) -> None:
    """Compile the kernels of a dtype, or find them on disk: they share what they are made of."""
    for name in compiled._KERNELS:
        compiled.kernel(name, dtype, simple)


def main() -> None:
    """Let processes, as many as there are cores, take one dtype after the other."""
    kinds = itertools.product(compiled.KINDS, (False, True))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_for, *zip(*kinds, strict=True)))


if __name__ == "__main__":
    main()
