"""How a kernel is launched: on the device of its tensors, or in Triton's interpreter."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from .moments import measure_parts

# Triton decides it where a kernel is defined: TRITON_INTERPRET=1 was in the environment then.
IS_INTERPRETED = not isinstance(measure_parts, triton.JITFunction)
_REAL = (Tensor, torch.nn.Parameter)  # the types that have memory


def launch(kernel: Any, programs: int, warps: int, on: Tensor, arguments: dict[str, Any]) -> None:
    """Run a kernel's programs on the device of `on`; or show the launch to a compiler that traces `on`.

    There is nothing here that such a compiler would drop: options of Triton's compiler, say.
    """
    if type(on) not in _REAL:
        torch.library.wrap_triton(kernel)[(programs,)](**arguments, num_warps=warps)
        return
    with _device_of(on):
        kernel[(programs,)](**arguments, num_warps=warps)


def stored(values: Tensor) -> Tensor:
    """Return values, which a compiler that traces them is to store, once for all kernels.

    Inductor (torch 2.13) computes what it need not store anew for each kernel that reads it.
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
