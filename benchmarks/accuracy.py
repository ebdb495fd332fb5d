"""Measures errors of output and gradients against float64, stock and ours, as the mean grows over the std.

The error is |found - reference| / (1 + max |reference|), its maximum over the tensor, dx in units of 1/std:
the contract of docs/architecture.md. Inputs are float32; the reference sees the same values in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm import functional, reference

from .layouts import LAYOUTS, memory_format
from .tables import Rows

SHAPE = (16, 8, 32, 32)
OFFSETS = (0.0, 1e1, 1e3, 1e5, 1e6)
QUICK_OFFSETS = (0.0, 1e5)


def measure(quick: bool = False) -> Rows:
    """Return one row per engine, layout and offset."""
    return [
        {"layer": name, "layout": layout, "mean_over_std": offset, **_errors(function, layout, offset)}
        for offset in (QUICK_OFFSETS if quick else OFFSETS)
        for layout in LAYOUTS
        for name, function in (("torch", F.batch_norm), ("batchnorm", functional.batch_norm))
    ]


def _errors(function: Any, layout: str, offset: float) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = (draw(*SHAPE) + offset).to(memory_format=memory_format(layout)).requires_grad_()
    dy = draw(*SHAPE).to(memory_format=memory_format(layout))
    weight, bias = (draw(SHAPE[1]).requires_grad_() for _ in range(2))
    y = function(x, None, None, weight, bias, training=True)
    found = (y, *torch.autograd.grad(y, (x, weight, bias), dy))
    wide = [tensor.detach().double().numpy() for tensor in (x, dy, weight, bias)]
    forward = reference.forward(wide[0], wide[2], wide[3])
    backward = reference.backward(*wide)
    std = torch.from_numpy(forward.var).sqrt().view(1, -1, 1, 1)
    units = (1.0, std, 1.0, 1.0)
    expected = (forward.y, backward.dx, backward.dweight, backward.dbias)
    names = ("y", "dx", "dweight", "dbias")
    return {
        name: _error(a.detach().double() * unit, torch.as_tensor(b) * unit)
        for name, a, b, unit in zip(names, found, expected, units, strict=True)
    }


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / (1 + expected.abs().max())).item()
