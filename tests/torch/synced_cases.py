"""The cases that ranks normalize together, and the answer of one process for all of their values."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import batchnorm
from batchnorm import reference
from batchnorm.statistics.policy import Policy
from tests.support.cases import Layout, lay_out
from tests.support.compare import Array, as_array

CHANNELS = 5
BATCH = batchnorm.Batch()
MOMENTUM = 0.3


class Part(NamedTuple):
    """A rank's tensors."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Case:
    """One call of a synchronized layer on every rank.

    Attributes:
        name: unique.
        samples: of each rank.
        space: S, of each rank; one entry serves all.
        over: the policy that takes the shared moments.
        layout, dtype, offset, masked, residual, activation: as of `tests.support.cases.Case`.
    """

    name: str
    samples: tuple[int, ...] = (4, 3, 5)
    space: tuple[tuple[int, ...], ...] = ((4, 3),)
    over: Policy = BATCH
    layout: Layout = "contiguous"
    dtype: torch.dtype = torch.float32
    offset: float = 0.0
    masked: bool = False
    residual: bool = False
    activation: str | None = None

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Of weight and bias, as under autocast: sums of rounded gradients could be held to nothing."""
        return torch.promote_types(self.dtype, torch.float32)

    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return weight, bias, running mean and running variance."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        weight, bias, mean, var = torch.rand(4, CHANNELS, generator=generator, dtype=torch.float64)
        return (
            (weight + 0.5).to(self.parameter_dtype),
            (bias - 0.5).to(self.parameter_dtype),
            mean + self.offset,
            var + 0.5,
        )

    def part(self, rank: int) -> Part:
        """Return what a rank has: of another mean and std than the others have."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + 1 + rank)
        shape = (self.samples[rank], CHANNELS, *self.space[rank % len(self.space)])

        def noise() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def placed(values: Tensor) -> Tensor:
            if mask is not None:
                values = values.masked_fill(~mask.unsqueeze(1), torch.nan)
            return lay_out(values.to(self.dtype), self.layout)

        mask = None
        if self.masked:
            mask = torch.rand(shape[0], *shape[2:], generator=generator) > 0.4
            if rank == 1:
                mask[:] = False
        x = placed(noise() * (1 + rank) + 0.5 * rank + self.offset)
        return Part(x, placed(noise()) if self.residual else None, placed(noise() + 0.2), mask)

    def layer(self, **options: Any) -> batchnorm.SyncBatchNorm:
        """Return the layer, with its parameters and running statistics of some past."""
        policy = batchnorm.Synced(over=self.over, timeout=600, **options)
        layer = batchnorm.SyncBatchNorm(
            CHANNELS, momentum=MOMENTUM, dtype=self.parameter_dtype, activation=self.activation
        )
        layer.statistics = policy
        tensors = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        with torch.no_grad():
            for tensor, value in zip(tensors, self.parameters(), strict=True):
                tensor.copy_(value)
        return layer


class Expected(NamedTuple):
    """What one process makes of all parts: each rank's y, dx and dresidual; sums, and statistics."""

    y: list[Array]
    dx: list[Array]
    dresidual: list[Array | None]
    dweight: Array
    dbias: Array
    std: Array
    running: reference.Running


def _flat(values: Tensor | None) -> Array | None:
    """Return `[N, C, *S]` as `[N S, C]`: ranks may have other S."""
    if values is None:
        return None
    return as_array(values.movedim(1, -1).reshape(-1, values.shape[1]))


def expected(case: Case, ranks: tuple[int, ...]) -> Expected:
    """Return what the ranks together should find."""
    parts = [case.part(rank) for rank in ranks]
    weight, bias, mean, var = map(as_array, case.parameters())
    size = case.over.size if isinstance(case.over, batchnorm.Ghost) else max(1, *case.samples)
    groups = max(1, *(-(-len(part.x) // size) for part in parts))
    found: dict[str, list[list[Array]]] = {name: [[] for _ in ranks] for name in ("y", "dx", "dresidual")}
    dweight, dbias, moments, std = 0.0, 0.0, [], []
    for group in range(groups):
        own = [Part(*(None if t is None else t[group * size : (group + 1) * size] for t in p)) for p in parts]
        x, residual, dy = (
            None if getattr(own[0], name) is None else np.concatenate([_flat(getattr(p, name)) for p in own])
            for name in ("x", "residual", "dy")
        )
        mask = None
        if case.masked:
            mask = np.concatenate([p.mask.reshape(-1).numpy() for p in own])
        options = {"residual": residual, "activation": case.activation, "mask": mask}
        assert x is not None
        if isinstance(case.over, batchnorm.Renorm):
            both = reference.renorm(
                x, dy, weight, bias, reference.Running(mean, var),
                r_max=case.over.r_max, d_max=case.over.d_max, **options,
            )  # fmt: skip
            y, gradients = both.y, both.gradients
        else:
            y = reference.forward(x, weight, bias, **options).y
            gradients = reference.backward(x, dy, weight, bias, **options)
        own_moments = reference.moments(x, mask)
        moments.append(own_moments)
        std.append(np.sqrt(own_moments.var[0] + 1e-5))
        dweight, dbias = dweight + gradients.dweight, dbias + gradients.dbias
        rows = np.cumsum([p.x.numel() // CHANNELS for p in own])[:-1]
        for name, values in (("y", y), ("dx", gradients.dx), ("dresidual", gradients.dresidual)):
            if values is not None:
                for place, part in zip(found[name], np.split(values, rows), strict=True):
                    place.append(part)
    total = moments[0]
    for more in moments[1:]:
        total = reference.merge(total, more)
    running = reference.update_running_torch(
        reference.Running(mean, var), total.mean[0], total.var[0], float(total.count[0]), momentum=MOMENTUM
    )
    y, dx, dresidual = (
        [np.concatenate(own) if own else None for own in found[n]] for n in ("y", "dx", "dresidual")
    )
    return Expected(y, dx, dresidual, dweight, dbias, np.max(std, axis=0), running)


GHOST, RENORM = batchnorm.Ghost(3), batchnorm.Renorm(1.2, 0.1, r_steps=(0, 0), d_steps=(0, 0))
CASES = (
    Case("plain"),
    Case("dense", space=((),)),
    Case("volumes", (2, 1, 2), ((3, 2, 2),)),
    Case("channels-last", layout="channels_last"),
    Case("strided", layout="strided"),
    Case("other sizes of images", space=((4, 3), (2, 5), (1, 1))),
    Case("one value each", (1, 1, 1), ((),)),
    Case("one rank has none", (4, 0, 5)),
    Case("fused", residual=True, activation="gelu"),
    Case("masked", masked=True),
    Case(
        "masked, fused, channels-last", layout="channels_last", masked=True, residual=True, activation="silu"
    ),
    Case("far from zero", offset=1e6),
    Case("float64", dtype=torch.float64, activation="tanh"),
    Case("bfloat16", dtype=torch.bfloat16),
    Case("float16, masked", dtype=torch.float16, masked=True, residual=True),
    Case("ghost", (7, 9, 8), over=GHOST),
    Case("ghost, masked", (7, 9, 8), over=GHOST, masked=True, residual=True, activation="elu"),
    Case("renorm", over=RENORM),
    Case("renorm, masked", over=RENORM, masked=True, residual=True, activation="tanh"),
)
