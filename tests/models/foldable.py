"""Shared by the tests of `fold`: networks without trivial values, and the comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.models.norms.find import find_norms
from tests.torch.twins import scramble

from .nets import anatomy

EXACT = 1e-12  # float64, of the largest value: a few roundings in each of a few layers


def ready(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the model in training mode, with norms away from their initial state."""
    for found in find_norms(model):
        if getattr(found.module, "running_mean", None) is not None:
            scramble(found.module) if hasattr(found.module, "num_batches_tracked") else _scramble(
                found.module
            )
    return model.to(dtype).train()


def _scramble(norm: nn.Module) -> None:
    for name in ("weight", "bias", "running_mean"):
        getattr(norm, name).normal_()
    norm.running_var.uniform_(0.5, 2)


def folded(model: nn.Module, x: Any, example: Any = None, *, left: int = 0, tolerance: float = EXACT) -> Any:
    """Fold; check the copy's outputs, how many norms are left, and that the model is untouched."""
    before = anatomy(model)
    copy = batchnorm.fold(model, example)
    assert anatomy(model) == before
    assert not any(module.training for module in copy.modules())
    assert len(find_norms(copy)) == left
    assert_equal(model, copy, x, tolerance)
    return copy


def assert_equal(model: nn.Module, copy: nn.Module, x: Any, tolerance: float = EXACT) -> None:
    """Raise unless both give the same in evaluation."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        wanted, given = model.eval()(x), copy(x)
    for module, training in modes:
        module.training = training
    assert isinstance(wanted, Tensor)
    assert given.dtype == wanted.dtype
    assert wanted.abs().max() > 0.01
    off = (given - wanted).abs().max() / wanted.abs().max()
    assert off <= tolerance, off


def reasons(model: nn.Module, example: Any = None) -> dict[str, str]:
    """Return why each norm that stays does, by name, as `inspect` says."""
    return {row.name: row.stays for row in batchnorm.inspect(model, example).rows if row.folds_into is None}


def homes(model: nn.Module, example: Any = None) -> dict[str, str | None]:
    """Return where each norm goes, as `inspect` says."""
    return {row.name: row.folds_into for row in batchnorm.inspect(model, example).rows}
