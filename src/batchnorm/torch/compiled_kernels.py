"""As `compiled.py`, with operators that `torch.compile` looks into: its graphs hold the kernels for GPUs.

So it knows what each of them reads and writes, and launches them as its own. Where sizes are symbols, which
would have to be numbers to cut a tensor into programs, the opaque operators stay: then one graph serves every
batch size. So they do behind a mask, whose bytes are a view that torch 2.13 cannot divide among its graphs.

Imported when there is something to compile: what it needs of torch is slow to import.
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


def _edition() -> str:
    """Return a digest of the sources: torch keeps on disk what it made of an operator, by its arguments."""
    folder = Path(choose.__file__).with_name("gpu")
    sources = [Path(__file__), Path(compiled.__file__), *sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


EDITION = _edition()


@triton_op("batchnorm::normalize_seen", mutates_args=())
def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    given_mean: Tensor | None,
    given_rstd: Tensor | None,
    activation: str | None,
    eps: float,
    group_size: int | None,
    edition: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (given_mean, given_rstd)
    gpu = choose.load("gpu")
    return compiled.normalized(gpu, x, weight, bias, residual, mask, *given, activation, eps, group_size)


@triton_op("batchnorm::normalize_seen_backward", mutates_args=())
def _normalize_backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str | None,
    given: bool,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gpu = choose.load("gpu")
    statistics = (mean, rstd)
    return compiled.gradients(
        gpu, x, dy, weight, bias, residual, mask, *statistics, activation, given, group_size
    )


compiled.register_gradient(_normalize, _normalize_backward)

# Asked while the graph is made, and not looked into: `use` in this context holds for the graph from then on.
_compiles = torch.compiler.assume_constant_result(choose.compiles)  # type: ignore[no-untyped-call]


def can_see(x: Tensor, eps: float, group_size: int | None) -> bool:
    """Whether these operators take x: the engine's for GPUs, of sizes that are numbers, with values."""
    numbers: tuple[Any, ...] = (*x.shape, *x.stride(), eps, group_size or 1)
    is_static = all(has_static_value(number) for number in numbers)
    return is_static and 0 not in x.shape and bool(_compiles(x.device.type, x.dtype))


def normalize(*arguments: Any) -> tuple[Tensor, ...]:
    """Return y, count, mean, m2 and rstd; see `compiled.normalized`."""
    found: tuple[Tensor, ...] = _normalize(*arguments, EDITION)
    return found
