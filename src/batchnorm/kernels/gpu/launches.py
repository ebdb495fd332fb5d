"""Launches the kernels of one call, with the arguments that they have in common."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from batchnorm.kernels.activations import TINY
from batchnorm.kernels.interface import Call
from batchnorm.kernels.layout import in_memory, is_alike, laid_out_as, shows_values

from .launcher import launch, stored
from .partition import merging, partition, power


class Launches:
    """One call: its tensors in the layout of x, and the arguments that its kernels have in common."""

    def __init__(self, call: Call, activation_mask: Tensor | None = None) -> None:
        x = in_memory(call.x)
        self.partition = partition(x.shape, x.stride(), call.group_size)
        if not self.partition.is_dense:
            x = x.contiguous()
        self.x = stored(x)
        self.activation = call.activation
        self.activation_mask = activation_mask
        is_wide = x.dtype == torch.float64
        self.real, self.REAL = (torch.float64, tl.float64) if is_wide else (torch.float32, tl.float32)
        self.mask = None if call.mask is None else call.mask.contiguous().view(torch.uint8)
        self.residual = None if call.residual is None else self.laid_out(call.residual)
        parameters = (call.weight, call.bias)
        self.weight, self.bias = (None if p is None else in_memory(p).contiguous() for p in parameters)

    def laid_out(self, values: Tensor) -> Tensor:
        """Returns values in the dtype and layout of x."""
        if is_alike(values, self.x) and shows_values(values):
            return stored(values)
        return torch.empty_like(self.x).copy_(values)

    def returned(self, output: Tensor, like: Tensor) -> Tensor:
        """Returns an output in the dtype and layout of `like`, the caller's own tensor."""
        return output if like is self.x else laid_out_as(like, output)

    def tables(self, number: int, *sizes: int) -> list[Tensor]:
        """Returns memory for so many tables per group and channel, `[*sizes, G, C]`; no views of one tensor.

        A compiler that sees a kernel write into several views of a tensor copies the tensor after each write.
        """
        shape = (*sizes, self.partition.groups, self.partition.channels)
        return [torch.empty(shape, dtype=torch.float64, device=self.x.device) for _ in range(number)]

    @property
    def tiles(self) -> dict[str, Any]:
        """The arguments by which a kernel finds the values of its tiles."""
        partition = self.partition
        return {
            "mask": self.mask,
            "channels": partition.channels,
            "positions": partition.positions,
            "units": partition.units,
            "group_units": partition.group_units,
            "REAL": self.REAL,
            "ROWS": partition.rows,
            "OUTER": partition.outer,
            "INNER": partition.inner,
            "EVEN": partition.is_even and self.mask is None,
        }

    @property
    def affine(self) -> dict[str, Any]:
        """The arguments of z, besides x and its statistics."""
        return {
            "residual": self.residual,
            "weight": self.weight,
            "bias": self.bias,
            "ACTIVATION": self.activation,
            "KINK": TINY.get(self.x.dtype, 0.0),
            "activation_mask": self.activation_mask,
        }

    @property
    def whole(self) -> dict[str, Any]:
        """The arguments of kernels whose programs take whole channels."""
        return {"tiles": self.partition.tiles, "SINGLE": self.partition.tiles == 1}

    def run(self, kernel: Any, parts: int, /, **arguments: Any) -> None:
        """Launches a kernel over tiles."""
        programs = self.partition.channel_tiles * parts * self.partition.groups
        launch(kernel, programs, self.partition.warps, self.x, arguments | {"x": self.x} | self.tiles)

    def steps(self) -> dict[str, int]:
        """Returns the number of parts, and of tiles in each, for kernels that read each value once."""
        span, tiles = self.partition.tiles, self.partition.step_tiles
        return {"parts": math.ceil(span / tiles), "tiles": tiles, "span": span}

    def merge(self, kernel: Any, **arguments: Any) -> None:
        """Launches a kernel over parts."""
        partition = self.partition
        block, channels = merging(partition.parts, partition.channels)
        shape = {"channels": partition.channels, "groups": partition.groups, "parts": partition.parts}
        sizes = {"PARTS": block, "CHANNELS": channels}
        programs = math.ceil(partition.channels / channels) * partition.groups
        launch(kernel, programs, 4, self.x, arguments | shape | sizes)

    def close(self, kernel: Any, **arguments: Any) -> None:
        """Launches a kernel that merges groups."""
        partition = self.partition
        block = min(32, power(partition.groups))
        channels = min(32, power(partition.channels))
        shape = {
            "channels": partition.channels,
            "groups": partition.groups,
            "GROUPS": block,
            "CHANNELS": channels,
        }
        launch(kernel, math.ceil(partition.channels / channels), 4, self.x, arguments | shape)
