"""Splits the time of one layer: an empty autograd Function, the kernels and their outputs, the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.choose import engine
from batchnorm.kernels.cpu import huge_pages
from batchnorm.torch.call import Call

from .interleaved import clocked, interleave, medians
from .layer_cases import LARGE, Case, layouts
from .layer_rivals import steps, tensors
from .progress import progress
from .tables import Rows, table_of

SHAPES = (
    (32, 64),
    (256, 512),
    (4, 1024, 7, 7),
    (32, 512, 7, 7),
    (4096, 1024),
    (32, 64, 56, 56),
    (32, 256, 56, 56),
)
_ROUNDS, _ROUNDS_OF_LARGE, _QUICK_ROUNDS = 301, 61, 15


def measure(quick: bool = False) -> Rows:
    """Return a row per shape and layout: medians in seconds of norm → ReLU, forward and backward."""
    cases = [Case("norm-relu", shape, layout) for shape in SHAPES for layout in layouts(shape)]
    found = []
    for case in progress(cases[:2] if quick else cases, "where the time goes"):
        parts = {**steps(case), "function": _function(case), "kernels": _kernels(case), **_written(case)}
        rounds = _ROUNDS_OF_LARGE if case.values > LARGE else _ROUNDS
        times = interleave(
            {name: clocked(step) for name, step in parts.items()}, _QUICK_ROUNDS if quick else rounds
        )
        found.append({"shape": list(case.shape), "layout": case.layout, "seconds": medians(times)})
    return found


class _Empty(torch.autograd.Function):
    """Takes and returns what our layer's does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG004
        x, weight, bias = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _function(case: Case) -> Callable[[], object]:
    given = tensors(case)
    leaves = [given.x.requires_grad_(), *_parameters(case)]

    def step() -> None:
        torch.autograd.backward(_Empty.apply(*leaves), given.dy)
        for leaf in leaves:
            leaf.grad = None

    return step


def _kernels(case: Case) -> Callable[[], object]:
    given = tensors(case)
    chosen, (weight, bias) = engine(given.x), (t.detach() for t in _parameters(case))

    def step() -> None:
        call = Call(given.x, weight, bias, activation=case.activation)
        _, statistics = chosen.forward(call)
        chosen.backward(call, given.dy, statistics, False)

    return step


def _written(case: Case) -> dict[str, Callable[[], object]]:
    """Return what writes y and dx once: into new memory, as our kernels take it, and into old."""
    x = tensors(case).x
    old = [torch.zeros_like(x), torch.zeros_like(x)]

    def write(outputs: list[Tensor]) -> None:
        for output in outputs:
            output.zero_()

    return {
        "new": lambda: write([huge_pages.empty_like(x), huge_pages.empty_like(x)]),
        "old": lambda: write(old),
    }


def _parameters(case: Case) -> tuple[Tensor, Tensor]:
    channels = case.shape[1]
    return torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)


_PARTS = {
    "stock": "stock",
    "ours": "ours",
    "function": "empty Function",
    "kernels": "kernels",
    "copy": "a copy",
    "new": "y and dx zeroed, new memory",
    "old": "the same, old memory",
}


def bounds_table(rows: Rows) -> str:
    """Microseconds of each part; the copy is of one tensor."""
    return table_of(
        {"shape": str(tuple(row["shape"])), "layout": row["layout"]}
        | {f"{shown}, µs": f"{row['seconds'][name] * 1e6:.0f}" for name, shown in _PARTS.items()}
        for row in rows
    )
