"""From moments to running statistics: checked, used for a while, written, and compared with those before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import DataError
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.calibration import LayerChange
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import Policy

RUNNING = ("running_mean", "running_var")


def running_statistics(name: str, norm: _BatchNorm, found: PooledMoments) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance as the norm's buffers hold them.

    Raises:
        DataError: one value per channel in all, NaN, inf, or a variance beyond the buffer's dtype.
    """
    if found.count < 2:
        raise DataError(
            "received one value per channel in all of the data: no variance; the model is unchanged", name
        )
    wide = (found.mean, found.m2 / (found.count - 1))
    mean, var = (_as_in(norm, place, value) for place, value in zip(RUNNING, wide, strict=True))
    if not (mean.isfinite().all() and var.isfinite().all()):
        if not all(statistic.isfinite().all() for statistic in wide):
            raise DataError("received NaN or inf; the model is unchanged", name)
        raise DataError(
            f"its running statistics overflow {mean.dtype}; the model is unchanged: scale the input, or keep "
            "them in a wider dtype",
            name,
        )
    return mean, var


def change(name: str, norm: _BatchNorm, found: PooledMoments, exact: bool) -> LayerChange:
    """Return how far the statistics in the buffers are from what was found."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    old_mean, old_var = (b.detach().cpu().double().numpy() for b in (norm.running_mean, norm.running_var))
    var = (found.m2 / (found.count - 1)).numpy()
    return LayerChange.between(
        name, int(found.count), (old_mean, old_var), (found.mean.numpy(), var), norm.eps, exact
    )


@contextlib.contextmanager
def in_place_of(name: str, norm: _BatchNorm, found: PooledMoments) -> Iterator[None]:
    """Have a norm use what was found for its running statistics; after the block it has its own again.

    It uses them alone, also where its policy adapts them to each batch.
    """
    own = {place: norm._buffers[place] for place in RUNNING}
    policy = getattr(norm, "_statistics", None)
    adapts = isinstance(policy, Policy) and policy.measures(training=False)
    norm._buffers.update(zip(RUNNING, running_statistics(name, norm, found), strict=True))
    try:
        if adapts:
            vars(norm)["_statistics"] = Batch()
        yield
    finally:
        norm._buffers.update(own)
        if adapts:
            vars(norm)["_statistics"] = policy


def write(values: list[tuple[Tensor | None, Tensor]]) -> None:
    """Copy each value into its buffer."""
    with torch.no_grad():  # a buffer that learns is written to all the same
        for buffer, value in values:
            if buffer is not None:
                buffer.copy_(value)


def _as_in(norm: _BatchNorm, place: str, value: Tensor) -> Tensor:
    buffer = norm._buffers[place]
    assert buffer is not None
    return value.to(buffer.device, buffer.dtype)
