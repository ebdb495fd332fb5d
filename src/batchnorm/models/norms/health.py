"""Diagnoses the statistics and parameters of a batch normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_HUGE = 1e12  # a variance above: values near 1e6, where the input is more likely broken than large


def health(norm: nn.Module) -> tuple[str, ...]:
    """Return the defects of a batch normalization, () where there is none.

    These are running statistics that were never updated, NaN or inf, variances that are zero, negative or
    above 1e12, and weights that are zero (dead channels).
    """
    tensors = {
        name: getattr(norm, name, None)
        for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
    }
    present = [tensor for tensor in tensors.values() if isinstance(tensor, Tensor)]
    if any(is_lazy(tensor) for tensor in present):
        return ("not initialized: it has seen no input",)
    if any(tensor.is_meta for tensor in present):
        return ("on the meta device: no values",)
    with torch.no_grad():
        return tuple(_statistics(tensors) + _parameters(tensors))


def _statistics(tensors: dict[str, Tensor | None]) -> list[str]:
    mean, var, batches = (tensors[name] for name in ("running_mean", "running_var", "num_batches_tracked"))
    if mean is None or var is None:
        return []
    is_initial = bool((mean == 0).all() and (var == 1).all())
    if is_initial and (batches is None or int(batches) == 0):
        return ["never updated"]
    found = []
    unusable = ~(mean.isfinite() & var.isfinite())
    for what, channels in (
        ("NaN or inf", unusable),
        ("negative variance", var < 0),
        ("zero variance", var == 0),
        ("huge variance", (var > _HUGE) & ~unusable),
    ):
        found += _counted(what, channels)
    return found


def _parameters(tensors: dict[str, Tensor | None]) -> list[str]:
    found = []
    for name in ("weight", "bias"):
        parameter = tensors[name]
        if parameter is not None:
            found += _counted(f"NaN or inf in {name}", ~parameter.isfinite())
    weight = tensors["weight"]
    return found if weight is None else found + _counted("dead weight", weight == 0)


def _counted(what: str, channels: Tensor) -> list[str]:
    count = int(channels.sum())
    return [f"{what} ({count} of {channels.numel()})"] if count else []
