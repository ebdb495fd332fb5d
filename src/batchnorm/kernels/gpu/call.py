"""One call: its tensors in the layout of x, and what all of its kernels are told."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from batchnorm.kernels.activations import TINY
from batchnorm.kernels.layout import is_alike, laid_out_as

from .launching import launch, stored
from .plan import merging, plan, power


class Call:
    """One call: its tensors in the layout of x, and what all of its kernels are told."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        mask: Tensor | None = None,
        group_size: int | None = None,
        signs: Tensor | None = None,
    ) -> None:
        if x.is_neg():
            x = x.resolve_neg()
        self.plan = plan(x.shape, x.stride(), group_size)
        if not self.plan.is_dense:
            x = x.contiguous()
        self.x = stored(x)
        self.activation = activation
        self.signs = signs
        is_wide = x.dtype == torch.float64
        self.real, self.REAL = (torch.float64, tl.float64) if is_wide else (torch.float32, tl.float32)
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self.residual = None if residual is None else self.laid_out(residual)
        self.weight = None if weight is None else weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()

    def laid_out(self, values: Tensor) -> Tensor:
        """Return values in the dtype and layout of x."""
        if is_alike(values, self.x) and not values.is_neg():
            return stored(values)
        return torch.empty_like(self.x).copy_(values)

    def returned(self, output: Tensor, like: Tensor) -> Tensor:
        """Return an output in the dtype and layout of what the caller gave."""
        return output if like is self.x else laid_out_as(like, output)

    def tables(self, number: int, *sizes: int) -> list[Tensor]:
        """Return room for so many tables per group and channel, `[*sizes, G, C]`; no views of one tensor.

        A compiler that sees a kernel write into several views of a tensor copies that after each.
        """
        shape = (*sizes, self.plan.groups, self.plan.channels)
        return [torch.empty(shape, dtype=torch.float64, device=self.x.device) for _ in range(number)]

    @property
    def tiles(self) -> dict[str, Any]:
        """Where a kernel finds the values of its tiles."""
        plan = self.plan
        return {
            "mask": self.mask,
            "channels": plan.channels,
            "positions": plan.positions,
            "units": plan.units,
            "group_units": plan.group_units,
            "REAL": self.REAL,
            "ROWS": plan.rows,
            "OUTER": plan.outer,
            "INNER": plan.inner,
            "EVEN": plan.is_even and self.mask is None,
        }

    @property
    def affine(self) -> dict[str, Any]:
        """What z is made of, apart from x and its statistics."""
        return {
            "residual": self.residual,
            "weight": self.weight,
            "bias": self.bias,
            "ACTIVATION": self.activation,
            "KINK": TINY.get(self.x.dtype, 0.0),
            "signs": self.signs,
        }

    @property
    def whole(self) -> dict[str, Any]:
        """What a kernel is told that takes whole channels."""
        return {"tiles": self.plan.tiles, "SINGLE": self.plan.tiles == 1}

    def run(self, kernel: Any, parts: int, /, **arguments: Any) -> None:
        """Launch a kernel over tiles."""
        programs = self.plan.channel_tiles * parts * self.plan.groups
        launch(kernel, programs, self.plan.warps, self.x, arguments | {"x": self.x} | self.tiles)

    def steps(self) -> dict[str, int]:
        """Into how many parts tiles are cut where each value is read once, and of how many tiles."""
        span, tiles = self.plan.tiles, self.plan.step_tiles
        return {"parts": math.ceil(span / tiles), "tiles": tiles, "span": span}

    def merge(self, kernel: Any, **arguments: Any) -> None:
        """Launch a kernel over parts."""
        plan = self.plan
        block, channels = merging(plan.parts, plan.channels)
        shape = {"channels": plan.channels, "groups": plan.groups, "parts": plan.parts}
        sizes = {"PARTS": block, "CHANNELS": channels}
        programs = math.ceil(plan.channels / channels) * plan.groups
        launch(kernel, programs, 4, self.x, arguments | shape | sizes)

    def close(self, kernel: Any, **arguments: Any) -> None:
        """Launch a kernel that puts groups together."""
        plan = self.plan
        block = min(32, power(plan.groups))
        channels = min(32, power(plan.channels))
        shape = {"channels": plan.channels, "groups": plan.groups, "GROUPS": block, "CHANNELS": channels}
        launch(kernel, math.ceil(plan.channels / channels), 4, self.x, arguments | shape)
