"""The statistics policy of one call: it stands between the moments and the normalization by them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.interface import wide_dtype
from batchnorm.statistics.moments import PooledMoments, pooled
from batchnorm.statistics.policy import Chosen, Known, Policy

from . import collectives


class Namespace:
    """The functions of arrays that policies take, of torch."""

    sqrt = staticmethod(torch.sqrt)
    clip = staticmethod(torch.clip)
    where = staticmethod(torch.where)
    sum = staticmethod(torch.sum)
    stop_gradient = staticmethod(Tensor.detach)


class Choice(NamedTuple):
    """What the policy of a call takes into account.

    Attributes:
        policy: as it stands on the layer.
        training: the mode.
        known: running statistics, wide, and more; copies that no later step changes.
        ranks: who shares statistics; None = nobody.
        label: how other ranks know the layer.
        is_lenient: groups of fewer than two values are normalized by the running statistics.
        memory: what the running statistics were in passes that may come again; None where it does not matter.
    """

    policy: Policy
    training: bool
    known: Known
    ranks: collectives.Ranks | None = None
    label: str = ""
    is_lenient: bool = False
    memory: Any = None

    def share(
        self, batch: PooledMoments, *, differentiable: bool = False
    ) -> tuple[PooledMoments, float | Tensor]:
        """Return the moments of all who share, and the number of samples that these have.

        One packet: the number of samples; count, mean and m2 of each group.
        """
        if self.ranks is None:
            return batch, self.known.samples
        groups, channels = batch.mean.shape
        samples = batch.mean.new_zeros(1) + self.known.samples
        count = (batch.mean.new_zeros(groups, 1) + batch.count).reshape(-1)
        packet = torch.cat([samples, count, batch.mean.reshape(-1), batch.m2.reshape(-1)])
        gather = collectives.differentiable_gather if differentiable else collectives.gather
        everyone = gather(packet, self.ranks, f"{self.label} forward, {groups} x {channels}")
        samples, count, mean, m2 = everyone.split([1, groups, groups * channels, groups * channels], dim=1)
        size = len(everyone)
        parts = PooledMoments(
            count.reshape(size, groups, 1),
            mean.reshape(size, groups, channels),
            m2.reshape(size, groups, channels),
        )
        return pooled(parts, torch), samples.sum()

    def add(self, sum_dy: Tensor, sum_dy_xhat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of all ranks."""
        if self.ranks is None:
            return sum_dy, sum_dy_xhat
        groups, channels = sum_dy.shape
        total = collectives.add(
            torch.stack([sum_dy, sum_dy_xhat]), self.ranks, f"{self.label} backward, {groups} x {channels}"
        )
        return total[0], total[1]

    def choose(self, batch: PooledMoments, samples: float | Tensor) -> Chosen:
        """Return what the call normalizes by, `[G, C]` each, given what `share` returned."""
        known = self.known if self.memory is None else self.memory.known(self.known, batch)
        known = known._replace(samples=samples)
        chosen = self.policy.choose(batch, known, self.training, Namespace)
        chosen = Chosen(*(_table(value, batch.mean) for value in chosen))
        return _lenient(chosen, batch, known) if self.is_lenient else chosen


def _table(value: Any, like: Tensor) -> Tensor:
    """Return a number or tensor as `[G, C]`."""
    is_table = isinstance(value, Tensor) and value.shape == like.shape
    table: Tensor = value if is_table else torch.zeros_like(like) + value
    return table


def _lenient(chosen: Chosen, batch: PooledMoments, known: Known) -> Chosen:
    """Take the running statistics where a group has fewer than two values."""
    assert known.mean is not None
    assert known.var is not None
    enough = torch.as_tensor(batch.count >= 2, device=batch.mean.device)
    nothing = torch.zeros_like(batch.mean)
    given = (
        known.mean.expand_as(nothing),
        (known.var + known.eps).rsqrt().expand_as(nothing),
        *[nothing] * 3,
    )
    return Chosen(*(torch.where(enough, own, other) for own, other in zip(chosen, given, strict=True)))


def known_to(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    samples: Any,
    eps: float,
    like: torch.dtype,
) -> Known:
    """Return what a policy may know: wide copies of the running statistics."""
    mean, var = (None if t is None else t.detach().to(like, copy=True) for t in (running_mean, running_var))
    return Known(mean, var, None if batches is None else batches.detach().clone(), samples, eps)


def samples_of(x: Tensor, mask: Tensor | None) -> float | Tensor:
    """Return the number of samples with a value that counts, wide: of an integer, shares would be float32."""
    if mask is None:
        return float(x.shape[0])
    return mask.unsqueeze(1).flatten(1).any(1).sum(dtype=wide_dtype(x.device))
