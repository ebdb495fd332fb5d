"""Defines the operators for GPUs that `torch.compile` looks into, so that its graphs hold the kernels.

So the compiler knows what each kernel reads and writes, and launches the kernels itself. Where sizes are
symbols, the opaque operators of `compiled.py` run, and one graph serves every batch size: cutting a tensor
into programs takes numbers. Those operators also run calls with a mask, whose bytes are a view that torch
2.13 cannot divide among its graphs.

This module is imported when a call is compiled: what it needs of torch is slow to import.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.library import triton_op

from batchnorm.kernels import choose

from . import compiled
from .call import Call


def _sources() -> str:
    """Return a digest of the sources: torch caches a compiled operator on disk by its arguments."""
    folder = Path(choose.__file__).with_name("gpu")
    sources = [Path(__file__), Path(compiled.__file__), *sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


SOURCES = _sources()

_normalize = triton_op("batchnorm::normalize_seen", compiled.run_forward, mutates_args=())
_normalize_backward = triton_op("batchnorm::normalize_seen_backward", compiled.run_backward, mutates_args=())
compiled.register_gradient(_normalize, _normalize_backward)

# The compiler calls it once, while it makes the graph: an engine that `use` asks for then stays the graph's.
_compiles = torch.compiler.assume_constant_result(choose.compiles)  # type: ignore[no-untyped-call]


def can_see(call: Call) -> bool:
    """Whether these operators take a call: on the engine for GPUs, not empty, with sizes that are numbers."""
    numbers: tuple[Any, ...] = (*call.x.shape, *call.x.stride(), call.eps, call.group_size or 1)
    is_static = all(has_static_value(number) for number in numbers)
    return is_static and 0 not in call.x.shape and bool(_compiles(call.x.device.type, call.x.dtype))


def normalize(*arguments: Any) -> tuple[Tensor, ...]:
    """Return y, count, mean, m2 and rstd; see `compiled.run_forward`."""
    found: tuple[Tensor, ...] = _normalize(*arguments, SOURCES)
    return found
