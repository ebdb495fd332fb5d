"""The engine of plain torch operations: any device, any dtype, always there.

Every elementwise step is computed in the wide dtype, over chunks of samples: a chunk's temporaries stay in
the cache, where a float64 copy of the whole input would cost a page fault for every 4 KB. Sums of chunks are
added in order and a chunk's size is a constant, so that results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .interface import Moments, wide_dtype

# Values per chunk. A GPU launches kernels per chunk, so only memory bounds it: 2**26 values are 512 MB wide.
_CHUNK_CPU = 2**18
_CHUNK_DEVICE = 2**26
_ROW = 4096


@dataclass(frozen=True)
class _Chunks:
    """How x is cut along N: runs of samples that never straddle two groups."""

    x: Tensor
    group_size: int | None

    @property
    def groups(self) -> int:
        return 1 if self.group_size is None else max(1, math.ceil(len(self.x) / self.group_size))

    @property
    def dims(self) -> list[int]:
        return [0, *range(2, self.x.dim())]

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Yield (group, samples of the chunk)."""
        samples = len(self.x)
        values = self.x.numel() // max(1, samples)
        budget = _CHUNK_CPU if self.x.device.type == "cpu" else _CHUNK_DEVICE
        step = max(1, budget // max(1, values))
        size = samples if self.group_size is None else self.group_size
        for group in range(self.groups):
            end = min(samples, (group + 1) * size)
            for start in range(group * size, end, step):
                yield group, slice(start, min(end, start + step))

    def per_channel(self, vector: Tensor) -> Tensor:
        """Return `vector` `[C]` in the wide dtype, shaped to broadcast against x."""
        return vector.to(wide_dtype(self.x.device)).view(-1, *[1] * (self.x.dim() - 2))

    def sum(self, wide: Tensor) -> Tensor:
        """Return the sum of a chunk per channel, `[C]`.

        torch splits a sum over threads by its outputs, except where there is a single one; one channel is
        therefore summed by rows of constant length first.
        """
        if wide.shape[1] != 1:
            return wide.sum(self.dims)
        flat = wide.reshape(-1)
        whole = len(flat) // _ROW * _ROW
        return flat[:whole].view(-1, _ROW).sum(1).sum(0, keepdim=True) + flat[whole:].sum(0, keepdim=True)

    def zeros(self) -> Tensor:
        return torch.zeros(
            self.groups, self.x.shape[1], dtype=wide_dtype(self.x.device), device=self.x.device
        )


def _keep(mask: Tensor, samples: slice) -> Tensor:
    """Return the chunk's mask as `[n, 1, *S]`."""
    return mask[samples].unsqueeze(1)


def _wide(x: Tensor, samples: slice, mask: Tensor | None) -> Tensor:
    """Return a fresh wide copy of the chunk, zero where masked."""
    chunk = x[samples]
    chunk = chunk.to(wide_dtype(x.device), copy=True)
    return chunk if mask is None else chunk.masked_fill_(~_keep(mask, samples), 0.0)


def _counts(chunks: _Chunks, mask: Tensor | None) -> Tensor:
    count = torch.zeros(chunks.groups, dtype=wide_dtype(chunks.x.device), device=chunks.x.device)
    spatial = math.prod(chunks.x.shape[2:])
    for group, samples in chunks:
        count[group] += (samples.stop - samples.start) * spatial if mask is None else mask[samples].sum()
    return count


def moments(x: Tensor, *, mask: Tensor | None = None, group_size: int | None = None) -> Moments:
    """See `interface.Engine.moments`."""
    chunks = _Chunks(x, group_size)
    count = _counts(chunks, mask)
    divisor = count.clamp(min=1).unsqueeze(1)
    total, m2 = chunks.zeros(), chunks.zeros()
    for group, samples in chunks:
        total[group] += chunks.sum(_wide(x, samples, mask))
    mean = total.div_(divisor)
    for group, samples in chunks:
        centred = _wide(x, samples, mask).sub_(chunks.per_channel(mean[group]))
        if mask is not None:
            centred.masked_fill_(~_keep(mask, samples), 0.0)
        m2[group] += chunks.sum(centred.square_())
    return Moments(count, mean, m2)


@dataclass(frozen=True)
class _Affine:
    """z = weight * x̂ + bias + residual, chunk by chunk, and what of dy goes through the activation."""

    chunks: _Chunks
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    activation: str | None
    mask: Tensor | None

    def xhat(self, group: int, samples: slice) -> Tensor:
        wide = _wide(self.chunks.x, samples, self.mask)
        wide.sub_(self.chunks.per_channel(self.mean[group]))
        return wide.mul_(self.chunks.per_channel(self.rstd[group]))

    def z(self, xhat: Tensor, samples: slice) -> Tensor:
        z = xhat if self.weight is None else xhat * self.chunks.per_channel(self.weight)
        z = z if self.bias is None else z + self.chunks.per_channel(self.bias)
        return z if self.residual is None else z + self.residual[samples]

    def y(self, group: int, samples: slice) -> Tensor:
        z = self.z(self.xhat(group, samples), samples)
        y = z if self.activation is None else ACTIVATIONS[self.activation].value(z)
        return y if self.mask is None else y.masked_fill(~_keep(self.mask, samples), 0.0)

    def dy(self, dy: Tensor, xhat: Tensor, samples: slice) -> Tensor:
        wide = _wide(dy, samples, self.mask)
        if self.activation is None:
            return wide
        wide.mul_(ACTIVATIONS[self.activation].derivative(self.z(xhat, samples)))
        return wide if self.mask is None else wide.masked_fill_(~_keep(self.mask, samples), 0.0)


def normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    group_size: int | None = None,
) -> Tensor:
    """See `interface.Engine.normalize`."""
    chunks = _Chunks(x, group_size)
    affine = _Affine(chunks, mean, rstd, weight, bias, residual, activation, mask)
    y = torch.empty_like(x)
    for group, samples in chunks:
        y[samples] = affine.y(group, samples)
    return y


def backward_reduce(
    x: Tensor,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `interface.Engine.backward_reduce`."""
    chunks = _Chunks(x, group_size)
    affine = _Affine(chunks, mean, rstd, weight, bias, residual, activation, mask)
    sum_dy, sum_dy_xhat = chunks.zeros(), chunks.zeros()
    for group, samples in chunks:
        xhat = affine.xhat(group, samples)
        dz = affine.dy(dy, xhat, samples)
        sum_dy[group] += chunks.sum(dz)
        sum_dy_xhat[group] += chunks.sum(dz.mul_(xhat))
    return sum_dy, sum_dy_xhat


def backward_apply(
    x: Tensor,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `interface.Engine.backward_apply`."""
    chunks = _Chunks(x, group_size)
    affine = _Affine(chunks, mean, rstd, weight, bias, residual, activation, mask)
    dx = torch.empty_like(x)
    dresidual = None if residual is None else torch.empty_like(residual)
    for group, samples in chunks:
        a, b, c = (chunks.per_channel(coefficient[group]) for coefficient in coefficients)
        xhat = affine.xhat(group, samples)
        dz = affine.dy(dy, xhat, samples)
        if dresidual is not None:
            dresidual[samples] = dz
        gradient = dz.mul_(a).add_(xhat.mul_(b)).add_(c)
        dx[samples] = gradient if mask is None else gradient.masked_fill_(~_keep(mask, samples), 0.0)
    return dx, dresidual
