"""Launches a kernel on the device of its tensors, or in Triton's interpreter.

A kernel's parameters are no tuples: Triton 3.7 would take them, but `do_not_specialize` does not reach into
them, and `torch.library.wrap_triton` (torch 2.13) drops their tensors from the graph. Functions that kernels
call do take tuples of tiles, pointers and numbers; constants (`tl.constexpr`) stay apart, since unpacking
turns them into tensors.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from .moments import measure_parts

# Triton decides when a kernel is defined, by TRITON_INTERPRET=1 in the environment.
IS_INTERPRETED = not isinstance(measure_parts, triton.JITFunction)
_REAL = (Tensor, torch.nn.Parameter)  # the types that have memory; a compiler traces others


def launch(kernel: Any, programs: int, warps: int, on: Tensor, arguments: dict[str, Any]) -> None:
    """Runs a kernel's programs on the device of `on`; or records the launch for a compiler that traces `on`.

    It passes no option that such a compiler would drop, as Inductor does with options of Triton's compiler.
    """
    if type(on) not in _REAL:
        torch.library.wrap_triton(kernel)[(programs,)](**arguments, num_warps=warps)
        return
    with _device_of(on):
        kernel[(programs,)](**arguments, num_warps=warps)


def stored(values: Tensor) -> Tensor:
    """Returns values that a compiler which traces them stores in memory, once for all kernels.

    Inductor (torch 2.13) computes values that it does not have to store again for each kernel that reads
    them.
    """
    if type(values) in _REAL or values.storage_offset() != 0:
        return values
    return values.as_strided(values.shape, values.stride())


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    if tensor.is_cpu:
        return np.errstate(all="ignore")  # the interpreter computes in NumPy
    if tensor.get_device() == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    found: contextlib.AbstractContextManager[Any] = torch.get_device_module(tensor.device).device(
        tensor.device
    )
    return found
