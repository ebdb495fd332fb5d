"""Pools the moments of a call's groups, and checks that they are finite."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.errors import NonFiniteError
from batchnorm.statistics.moments import PooledMoments, pooled


def of_groups(count: Tensor, mean: Tensor, m2: Tensor) -> PooledMoments:
    """Return moments `[G, C]` with the count `[G]` as `[G, 1]`, which broadcasts against them."""
    return PooledMoments(count.unsqueeze(1), mean, m2)


def pooled_groups(batch: PooledMoments) -> PooledMoments:
    """Return the moments of all groups together, `[C]`."""
    if batch.mean.shape[0] > 1:
        return pooled(batch, torch)
    is_each = isinstance(batch.count, Tensor) and batch.count.dim() > 0  # a tracer's sizes are tensors, too
    count = batch.count[0] if is_each else batch.count
    return PooledMoments(count, batch.mean[0], batch.m2[0])


def is_finite(batch: PooledMoments) -> Tensor:
    """Return whether all moments are finite, as a tensor: the host does not wait for it."""
    return torch.isfinite(batch.mean).all() & torch.isfinite(batch.m2).all()


def check_finite(batch: PooledMoments) -> None:
    """Raise NonFiniteError unless all moments `[G, C]` are finite; the host waits for a device here."""
    if not is_finite(batch):
        finite = torch.isfinite(batch.mean) & torch.isfinite(batch.m2)
        channels = (~finite).any(0).nonzero().flatten().tolist()
        first = ", ".join(map(str, channels[:5])) + (", ..." if len(channels) > 5 else "")
        raise NonFiniteError(
            f"the input has inf or NaN in channel {first} ({len(channels)} of {finite.shape[1]}): look at "
            'what comes before this layer, or let it pass such batches over with nonfinite="skip"'
        )
