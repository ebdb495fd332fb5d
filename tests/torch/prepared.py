"""Layers whose calls run prepared launches, compared with a float64 stock layer of the same values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.kernels.cpu import prepared_launch as prepared
from tests.support.compare import assert_close
from tests.torch.twins import STATISTICS, scramble, step

SHAPE = (6, 5, 4, 3)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
Change = Callable[[nn.Module], object]


def norm(dtype: torch.dtype | None = None, **options: Any) -> nn.Module:
    return scramble(batchnorm.BatchNorm2d(5, dtype=dtype, **options))


def batch(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """Return an input whose mean is not zero, and a random cotangent."""
    return (torch.randn(shape) + 1).to(dtype), torch.randn(shape).to(dtype)


def exact_twin(layer: nn.Module) -> nn.Module:
    """Return a float64 stock layer in the mode of `layer`, with the values that it has now."""
    kind = nn.BatchNorm2d if isinstance(layer, nn.BatchNorm2d) else nn.BatchNorm1d
    twin = kind(layer.num_features, layer.eps, layer.momentum, True, layer.track_running_stats)
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        setattr(twin, name, None if value is None else nn.Parameter(value.detach().double()))
    for name in STATISTICS:
        value = getattr(layer, name)
        exact = torch.int64 if name == "num_batches_tracked" else torch.float64
        setattr(twin, name, None if value is None else value.detach().to(exact, copy=True))
    return twin.train(layer.training)


def assert_values(found: dict[str, Any], expected: dict[str, Any], names: tuple[str, ...] = ()) -> None:
    """Raise unless what two steps gave agrees, in these names or in all that are expected."""
    for name in names or tuple(expected):
        ours, theirs = found[name], expected[name]
        if theirs is None or name == "num_batches_tracked":
            assert ours is theirs or torch.equal(ours, theirs), name
        else:
            assert_close(ours, theirs, dtype=ours.dtype, what=name)


def assert_exact(layer: nn.Module, x: Tensor, dy: Tensor, names: tuple[str, ...] = ()) -> None:
    """Call the layer forward and backward; raise unless it gives what a float64 stock layer gives."""
    expected = step(exact_twin(layer), x.double(), dy.double())
    assert_values(step(layer, x, dy), expected, names)


@contextlib.contextmanager
def nothing_new_prepared() -> Iterator[None]:
    """Fail if a call in the block finds no launch of an earlier call."""
    before = prepared.prepare.cache_info().misses
    yield
    assert prepared.prepare.cache_info().misses == before
