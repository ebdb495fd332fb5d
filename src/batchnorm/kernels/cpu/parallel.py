"""Runs a kernel's tasks on torch's own threads, so that no second pool competes with these for the cores.

Each thread takes the next task that no thread has taken. Results do not depend on which thread runs which
task.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .kernel_args import KernelArgs

# Values from which it is worth to wake threads: below, one thread is done before the others have woken.
FEW = 2**15

_in_a_child = False


def _note_the_fork() -> None:
    global _in_a_child
    _in_a_child = True


if hasattr(os, "register_at_fork"):  # where there is a fork, the parent's threads are not in the child
    os.register_at_fork(after_in_child=_note_the_fork)


def run(kernel: int, args: KernelArgs, tasks: int) -> None:
    """Runs a kernel, given by its address, on a record of so many tasks."""
    threads = min(tasks, torch.get_num_threads())
    if threads == 1 or _in_a_child:
        worker(kernel)(ctypes.addressof(args))
    else:
        _on_threads()(kernel, ctypes.addressof(args), threads)


@functools.cache
def worker(kernel: int) -> Callable[[int], None]:
    """Returns the compiled function at an address; the GIL is free while it runs."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)


@functools.cache
def _on_threads() -> Callable[[int, int, int], None]:
    """Returns a function that runs a compiled function on several threads at a time."""
    try:
        # By the handle of torch's own library, the loader finds the OpenMP that torch uses.
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel = torch_library.GOMP_parallel
    except (OSError, AttributeError):  # no Linux, or a torch that was built without OpenMP
        return _on_threads_of_our_own
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return lambda function, address, threads: parallel(function, address, threads, 0)


def _on_threads_of_our_own(function: int, address: int, threads: int) -> None:
    work = worker(function)
    others = [_pool().submit(work, address) for _ in range(threads - 1)]
    work(address)
    for other in others:
        other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="batchnorm")
