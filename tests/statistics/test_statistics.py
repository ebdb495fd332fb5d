"""The per-channel mathematics against the reference, on NumPy arrays and on torch tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchnorm import reference
from batchnorm.statistics import batch, running
from batchnorm.statistics.moments import PooledMoments, merge

KINDS = pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])


@KINDS
@pytest.mark.parametrize("sizes", [(5, 8), (1, 30), (0, 4), (4, 0), (0, 0)], ids=str)
def test_merge_gives_the_moments_of_the_union(kind: object, sizes: tuple[int, int]) -> None:
    a, b = (np.random.randn(size, 3) * 2 + 100 for size in sizes)
    parts = [reference.moments(part) for part in (a, b)]
    found = merge(*(PooledMoments(*(kind(field[0]) for field in part)) for part in parts))
    expected = reference.moments(np.concatenate([a, b]))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs[0], rtol=1e-12, atol=1e-12)


@KINDS
def test_running_update_is_torchs_convention(kind: object) -> None:
    old, new = kind(np.array([1.0, -2.0])), kind(np.array([3.0, 5.0]))
    np.testing.assert_allclose(np.asarray(batch.running_update(old, new, 0.1)), [1.2, -1.3], rtol=1e-15)
    np.testing.assert_allclose(np.asarray(batch.running_update(old, new, 1.0)), [3.0, 5.0], rtol=0)


@KINDS
def test_gradient_coefficients(kind: object) -> None:
    x, dy, weight = np.random.randn(11, 3) + 4, np.random.randn(11, 3), np.array([0.5, -2.0, 3.0])
    forward, backward = reference.forward(x, weight), reference.backward(x, dy, weight)
    xhat = (x - forward.mean) * forward.rstd
    sums = kind(dy.sum(0, keepdims=True)), kind((dy * xhat).sum(0, keepdims=True))
    a, b, c = map(np.asarray, batch.gradient_coefficients(kind(weight), kind(forward.rstd), *sums, 11))
    np.testing.assert_allclose(a * dy + b * xhat + c, backward.dx, rtol=1e-12, atol=1e-12)

    mean, var = np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.0, 2.0])
    given = reference.backward(x, dy, weight, mean=mean, var=var)
    a, b, c = map(np.asarray, running.gradient_coefficients(kind(weight), kind((var + 1e-5) ** -0.5)))
    np.testing.assert_allclose(a * dy + b * xhat + c, given.dx, rtol=1e-12, atol=1e-12)
