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


def launch(kernel: Any, programs: int, warps: int, on: Tensor, arguments: dict[str, Any]) -> None:
    """Run a kernel's programs on the device of `on`.

    Products and sums are fused where a kernel says so, and nowhere else: the same z in every kernel.
    """
    with _device_of(on):
        kernel[(programs,)](**arguments, num_warps=warps, enable_fp_fusion=False)


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    if tensor.is_cpu:
        return np.errstate(all="ignore")  # the interpreter computes in NumPy
    if tensor.get_device() == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    found: contextlib.AbstractContextManager[Any] = torch.get_device_module(tensor.device).device(
        tensor.device
    )
    return found
