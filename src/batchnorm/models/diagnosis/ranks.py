"""Compares the running statistics that the processes of torch.distributed have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from batchnorm.models.calibration.observers import running_buffers
from batchnorm.models.norms.find import tracking_norms
from batchnorm.models.norms.kinds import BatchNormBase

from .passes import has_values


def statistics_row(model: nn.Module) -> Tensor:
    """Return the running means and variances of all norms, one after the other, as one row of float64."""
    parts = [
        of.detach().cpu().double().flatten()
        for norm in _norms(model).values()
        for of in running_buffers(norm)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def distances(model: nn.Module, rows: Sequence[Tensor]) -> dict[str, float]:
    """Return by norm how far the running statistics of any two processes are apart.

    That is the larger of two root mean squares over channels: of the difference of the means, in standard
    deviations, and of the logarithm of the ratio of the standard deviations; 0 where all bits are the same.

    Args:
        model: of this process.
        rows: `statistics_row` of each process; of one alone there is nothing to compare.
    """
    found, start = {}, 0
    stacked = torch.stack(list(rows))
    for name, norm in _norms(model).items() if len(rows) > 1 else ():
        channels = running_buffers(norm)[0].numel()
        means, vars = (stacked[:, at : at + channels] for at in (start, start + channels))
        off = (means.amax(0) - means.amin(0)) / (vars.mean(0) + norm.eps).sqrt()
        logs = 0.5 * ((vars.amax(0) + norm.eps) / (vars.amin(0) + norm.eps)).log()
        own = stacked[:, start : start + 2 * channels].nan_to_num()
        apart = max(float(of.square().mean().sqrt()) for of in (off, logs))
        found[name] = 0.0 if bool((own == own[0]).all()) else apart
        start += 2 * channels
    return found


def _norms(model: nn.Module) -> dict[str, BatchNormBase]:
    return {name: norm for name, norm in tracking_norms(model).items() if has_values(norm)}
