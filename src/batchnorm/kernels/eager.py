"""Computes the primitives by plain torch operations: the engine for any device and dtype, always there.

It computes every elementwise step in the wide dtype, over chunks of samples: a chunk's temporaries stay in
the cache, where a float64 copy of the whole input would cost a page fault for every 4 KB. Sums of chunks are
added in order and a chunk's size is a constant, so that results do not depend on the number of threads. A
small input is one chunk, and what both halves of a pass need is then computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .interface import Call, Coefficients, Moments, RunningState, Statistics, wide_dtype

# Values per chunk. A GPU launches kernels per chunk, so only memory bounds it: 2**26 values are 512 MB wide.
_CHUNK_CPU = 2**18
_CHUNK_DEVICE = 2**26
_ROW = 4096


class _Chunks:
    """The chunks into which `[N, C, *S]` is cut along N; no chunk has samples of two groups.

    Vectors per channel have a shape that broadcasts against x: a row `[1, C, 1, ...]` for each group.
    """

    def __init__(self, x: Tensor, mask: Tensor | None, group_size: int | None) -> None:
        self.x = x
        self.mask = mask
        self.samples = x.shape[0]
        self.size = max(1, self.samples) if group_size is None else group_size
        self.groups = max(1, math.ceil(self.samples / self.size))
        self.wide = wide_dtype(x.device)
        self.dims = [0, *range(2, x.dim())]
        self.spatial = [1] * (x.dim() - 2)
        budget = _CHUNK_CPU if x.device.type == "cpu" else _CHUNK_DEVICE
        self.step = max(1, budget // max(1, x.numel() // max(1, self.samples)))
        self.single = self.groups == 1 and 0 < self.samples <= self.step

    def __iter__(self) -> Iterator[tuple[int, slice | None]]:
        """Yields (group, samples of the chunk); None stands for all samples."""
        if self.single:
            yield 0, None
            return
        for group in range(self.groups):
            end = min(self.samples, (group + 1) * self.size)
            for start in range(group * self.size, end, self.step):
                yield group, slice(start, min(end, start + self.step))

    def spread(self, vector: Tensor) -> Tensor:
        """Returns `[G, C]` or `[C]` shaped to broadcast against x."""
        return vector.view(*vector.shape, *self.spatial) if self.spatial else vector

    def gather(self, spread: Tensor) -> Tensor:
        """Returns `[G, C, 1, ...]` as `[G, C]`."""
        return spread.view(spread.shape[:2]) if self.spatial else spread

    def of(self, spread: Tensor, group: int) -> Tensor:
        """Returns a group's row of a spread `[G, C, 1, ...]`."""
        return spread if self.groups == 1 else spread[group : group + 1]

    def clear(self, chunk: Tensor, samples: slice | None) -> Tensor:
        """Zeroes the masked positions of a fresh chunk, in place."""
        if self.mask is None:
            return chunk
        return chunk.masked_fill_(~take(self.mask, samples).unsqueeze(1), 0.0)

    def sum(self, chunk: Tensor) -> Tensor:
        """Returns the sum of a chunk per channel, a wide row.

        torch splits a sum over threads by its outputs, except where there is a single one; one channel is
        therefore summed by rows of constant length first.
        """
        if chunk.shape[1] != 1:
            return chunk.sum(self.dims, keepdim=True, dtype=self.wide)
        flat = chunk.reshape(-1)
        whole = len(flat) // _ROW * _ROW
        rows = flat[:whole].view(-1, _ROW).sum(1, dtype=self.wide)
        total = rows.sum(0) + flat[whole:].sum(0, dtype=self.wide)
        return total.view([1, 1, *self.spatial])

    def total(self, parts: Iterator[tuple[int, tuple[Tensor, ...]]], width: int) -> tuple[Tensor, ...]:
        """Returns `width` sums, spread, of (group, sums of a chunk), added in order."""
        sums: list[tuple[Tensor, ...] | None] = [None] * self.groups
        for group, part in parts:
            before = sums[group]
            sums[group] = part if before is None else tuple(a + b for a, b in zip(before, part, strict=True))
        if self.groups == 1 and sums[0] is not None:
            return sums[0]
        shape = [1, self.x.shape[1], *self.spatial]
        empty = (torch.zeros(shape, dtype=self.wide, device=self.x.device),) * width
        return tuple(torch.cat(column) for column in zip(*(part or empty for part in sums), strict=True))

    def count(self) -> Tensor:
        """Returns the number of values per channel, `[G]`, wide."""
        positions = math.prod(self.x.shape[2:])
        if self.mask is None:
            full, last = self.size * positions, (self.samples - (self.groups - 1) * self.size) * positions
            count = torch.full((self.groups,), float(full), dtype=self.wide, device=self.x.device)
            if last != full:
                count[-1] = last
            return count
        per_sample = self.mask.unsqueeze(1).flatten(1).sum(1, dtype=self.wide)
        return torch.stack([part.sum() for part in torch.split(per_sample, self.size)])

    def divisor(self, count: Tensor) -> Tensor | float:
        """Returns the counts to divide spread sums by: at least 1, a number where one serves all."""
        if self.groups == 1 and self.mask is None:
            return max(1.0, float(self.samples * math.prod(self.x.shape[2:])))
        return count.clamp(min=1).view(-1, 1, *self.spatial)


def take(tensor: Tensor, samples: slice | None) -> Tensor:
    """Returns those samples of a tensor; None stands for all."""
    return tensor if samples is None else tensor[samples]


class _Pass:
    """One batch normalization, chunk by chunk; what a single chunk has computed is kept for the next step."""

    def __init__(
        self,
        chunks: _Chunks,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        self.chunks = chunks
        self.weight = None if weight is None else chunks.spread(weight)
        self.bias = None if bias is None else chunks.spread(bias)
        self.residual = residual
        self.activation = None if activation is None else ACTIVATIONS[activation]
        self.mean: Tensor
        self.rstd: Tensor
        self._centred: Tensor | None = None
        self._kept: tuple[Tensor, Tensor] | None = None

    def given(self, mean: Tensor, rstd: Tensor) -> Self:
        """Sets the statistics to normalize by, `[G, C]` each."""
        self.mean, self.rstd = self.chunks.spread(mean), self.chunks.spread(rstd)
        return self

    def measure(self) -> tuple[Tensor, Tensor, Tensor | float]:
        """Sets the mean to the batch's own; returns the count `[G]`, m2 spread, and the divisor of m2."""
        chunks = self.chunks
        count = chunks.count()
        divisor = chunks.divisor(count)

        def sums() -> Iterator[tuple[int, tuple[Tensor, ...]]]:
            for group, samples in chunks:
                chunk = take(chunks.x, samples)
                if chunks.mask is not None:
                    chunk = chunks.clear(chunk.clone(), samples)
                yield group, (chunks.sum(chunk),)

        self.mean = chunks.total(sums(), 1)[0] / divisor

        def squares() -> Iterator[tuple[int, tuple[Tensor, ...]]]:
            for group, samples in chunks:
                yield group, (chunks.sum(self.centred(group, samples).square()),)

        return count, chunks.total(squares(), 1)[0], divisor

    def centred(self, group: int, samples: slice | None) -> Tensor:
        """Returns x - mean of a chunk, wide, zero where masked."""
        if self._centred is not None:
            return self._centred
        chunks = self.chunks
        found = chunks.clear(take(chunks.x, samples) - chunks.of(self.mean, group), samples)
        if chunks.single:
            self._centred = found
        return found

    def xhat(self, group: int, samples: slice | None) -> Tensor:
        """Returns x̂ of a chunk, wide, zero where masked."""
        return self.centred(group, samples) * self.chunks.of(self.rstd, group)

    def z(self, base: Tensor, scale: Tensor | None, samples: slice | None) -> Tensor:
        """Returns scale * base + bias + residual: z, of x̂ and weight, or of x - mean and weight * rstd."""
        if scale is None:
            z = base if self.bias is None else base + self.bias
        else:
            z = base * scale if self.bias is None else torch.addcmul(self.bias, base, scale)
        return z if self.residual is None else z + take(self.residual, samples)

    def normalize(self) -> Tensor:
        """Returns y in the dtype and layout of x, zero where masked."""
        chunks = self.chunks
        scale = self.rstd if self.weight is None else self.rstd * self.weight
        y = torch.empty_like(chunks.x)
        for group, samples in chunks:
            z = self.z(self.centred(group, samples), chunks.of(scale, group), samples)
            chunk = z if self.activation is None else self.activation.value(z)
            take(y, samples).copy_(chunks.clear(chunk, samples))
        return y

    def xhat_and_dz(self, dy: Tensor, group: int, samples: slice | None) -> tuple[Tensor, Tensor]:
        """Returns x̂ and dy', dy through the activation, both wide and zero where masked."""
        if self._kept is not None:
            return self._kept
        xhat = self.xhat(group, samples)
        chunk = take(dy, samples)
        if self.activation is None:
            dz = chunk.to(self.chunks.wide, copy=True)
        else:
            dz = self.activation.derivative(self.z(xhat, self.weight, samples)) * chunk
        found = xhat, self.chunks.clear(dz, samples)
        if self.chunks.single:
            self._kept = found
        return found

    def reduce(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Returns Σ dy' and Σ dy' x̂, `[G, C]`."""
        chunks = self.chunks

        def parts() -> Iterator[tuple[int, tuple[Tensor, ...]]]:
            for group, samples in chunks:
                xhat, dz = self.xhat_and_dz(dy, group, samples)
                yield group, (chunks.sum(dz), chunks.sum(dz * xhat))

        sum_dy, sum_dy_xhat = chunks.total(parts(), 2)
        return chunks.gather(sum_dy), chunks.gather(sum_dy_xhat)

    def apply(self, dy: Tensor, coefficients: Coefficients) -> tuple[Tensor, Tensor | None]:
        """Returns dx = a dy' + b x̂ + c, and dresidual = dy'."""
        chunks = self.chunks
        a, b, c = map(chunks.spread, coefficients)
        dx = torch.empty_like(chunks.x)
        dresidual = None if self.residual is None else torch.empty_like(self.residual)
        for group, samples in chunks:
            xhat, dz = self.xhat_and_dz(dy, group, samples)
            if dresidual is not None:
                take(dresidual, samples).copy_(dz)
            found = torch.addcmul(chunks.of(c, group), xhat, chunks.of(b, group))
            found.addcmul_(dz, chunks.of(a, group))
            take(dx, samples).copy_(chunks.clear(found, samples))
        return dx, dresidual


def _pass(call: Call) -> _Pass:
    chunks = _Chunks(call.x, call.mask, call.group_size)
    return _Pass(chunks, call.weight, call.bias, call.residual, call.activation)


def moments(call: Call) -> Moments:
    """See `interface.Engine.moments`."""
    step = _pass(call)
    count, m2, _ = step.measure()
    return Moments(count, step.chunks.gather(step.mean), step.chunks.gather(m2))


def forward(
    call: Call, running: RunningState | None = None, activation_mask: Tensor | None = None
) -> tuple[Tensor, Statistics]:
    """See `interface.Engine.forward`."""
    assert running is None, "it moves none"
    assert activation_mask is None, "it keeps none"
    step = _pass(call)
    count, m2, divisor = step.measure()
    step.rstd = (m2 / divisor).add_(call.eps).rsqrt_()
    gather = step.chunks.gather
    return step.normalize(), (gather(step.mean), gather(step.rstd), count, gather(m2))


def evaluate(
    call: Call,
    mean: Tensor,
    var: Tensor,
    activation_mask: Tensor | None = None,
    *,
    keeps: bool = True,  # noqa: ARG001
) -> tuple[Tensor, Statistics]:
    """See `interface.Engine.evaluate`."""
    statistics = constants(mean, var, call.eps)
    return normalize(call, statistics, activation_mask), statistics


def constants(mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns mean and rstd `[1, C]`, wide, of running statistics: copies, as the originals will move."""
    wide = wide_dtype(mean.device)
    rstd = (var.detach().to(wide) + eps).rsqrt()
    return mean.detach().to(wide, copy=True).unsqueeze(0), rstd.unsqueeze(0)


def normalize(call: Call, statistics: Statistics, activation_mask: Tensor | None = None) -> Tensor:
    """See `interface.Engine.normalize`."""
    assert activation_mask is None, "it keeps none"
    return _pass(call).given(*statistics[:2]).normalize()


def unpack(statistics: Statistics, channels: int) -> tuple[Moments, Tensor]:  # noqa: ARG001
    """See `interface.Engine.unpack`."""
    mean, rstd, count, m2 = statistics
    return Moments(count, mean, m2), rstd


def backward(
    call: Call,
    dy: Tensor,
    statistics: Statistics,
    constant: bool,
    activation_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `interface.Engine.backward`."""
    assert activation_mask is None, "it keeps none"
    rstd = statistics[1]
    step = _pass(call).given(*statistics[:2])
    sum_dy, sum_dy_xhat = step.reduce(dy)
    a = rstd if call.weight is None else rstd * call.weight
    if constant:
        b = c = torch.zeros_like(a)
    else:
        share = -a / step.chunks.count().clamp(min=1).unsqueeze(1)
        b, c = share * sum_dy_xhat, share * sum_dy
    dx, dresidual = step.apply(dy, (a, b, c))
    dtype = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    return dx, sum_dy_xhat.sum(0).to(dtype), sum_dy.sum(0).to(dtype), dresidual


def backward_reduce(call: Call, dy: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """See `interface.Engine.backward_reduce`."""
    return _pass(call).given(*statistics[:2]).reduce(dy)


def backward_apply(
    call: Call, dy: Tensor, statistics: Statistics, coefficients: Coefficients
) -> tuple[Tensor, Tensor | None]:
    """See `interface.Engine.backward_apply`."""
    return _pass(call).given(*statistics[:2]).apply(dy, coefficients)


def moves(x: Tensor, running: RunningState) -> bool:  # noqa: ARG001
    """See `interface.Engine.moves`: this engine leaves that to the caller."""
    return False


def activation_mask(call: Call) -> Tensor | None:  # noqa: ARG001
    """See `interface.Engine.activation_mask`: this engine keeps none."""
    return None
