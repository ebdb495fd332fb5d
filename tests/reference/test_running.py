"""The running statistics against torch's layer, and against the equation in Keras's documentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchnorm.reference import (
    Running,
    moments,
    update_running_keras,
    update_running_pooled,
    update_running_sequential,
    update_running_torch,
)

START = Running(np.array([0.5, -1.0, 2.0]), np.array([1.5, 0.3, 2.5]))
SIZES = (6, 2, 0, 9)


def batch_of(size: int) -> np.ndarray:
    return np.random.default_rng(size).normal([1, -3, 8], [0.5, 2, 4], size=(size, 3))


@pytest.mark.parametrize("momentum", [0.1, 0.37, 1.0, 0.0, None])
def test_torch_convention_is_that_of_torch(momentum: float | None) -> None:
    layer = torch.nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    layer.running_mean.copy_(torch.from_numpy(START.mean))
    layer.running_var.copy_(torch.from_numpy(START.var))
    running = START
    for batches, size in enumerate(SIZES, start=1):
        x = batch_of(size)
        layer(torch.from_numpy(x))
        of_batch = moments(x)
        running = update_running_torch(
            running, of_batch.mean[0], of_batch.var[0], size, momentum=momentum, batches=batches
        )
        assert layer.num_batches_tracked == batches
        np.testing.assert_allclose(running.mean, layer.running_mean.numpy(), rtol=1e-13)
        np.testing.assert_allclose(running.var, layer.running_var.numpy(), rtol=1e-13)


def test_keras_convention_is_its_equation() -> None:
    x = batch_of(6)
    running = update_running_keras(START, x.mean(axis=0), x.var(axis=0), len(x), momentum=0.9)
    np.testing.assert_allclose(running.mean, START.mean * 0.9 + x.mean(axis=0) * 0.1, rtol=1e-14)
    np.testing.assert_allclose(running.var, START.var * 0.9 + x.var(axis=0) * 0.1, rtol=1e-14)


def test_the_conventions_differ_in_direction_and_in_the_variance() -> None:
    mean, var = np.array([1.0]), np.array([4.0])
    start = Running(np.array([0.0]), np.array([0.0]))
    by_torch = update_running_torch(start, mean, var, 5, momentum=0.25)
    by_keras = update_running_keras(start, mean, var, 5, momentum=0.25)
    assert by_torch == Running(np.array([0.25]), np.array([1.25]))
    assert by_keras == Running(np.array([0.75]), np.array([3.0]))


def test_an_empty_batch_leaves_them_alone() -> None:
    empty = moments(np.ones((0, 3)))
    for update in (update_running_torch, update_running_keras):
        assert update(START, empty.mean[0], empty.var[0], 0) is START


def test_one_value_has_no_variance_and_moves_nothing() -> None:
    assert update_running_torch(START, np.ones(3), np.zeros(3), 1, momentum=1.0) is START


MASKS = [None, np.array([1, 1, 0, 0, 0, 1, 1, 1, 0], dtype=np.bool_)]  # of one group all, of one all but one


@pytest.mark.parametrize("mask", MASKS, ids=["all", "masked"])
def test_pooled_groups_are_one_batch(mask: np.ndarray | None) -> None:
    x = batch_of(9)
    whole = moments(x, mask)
    expected = update_running_torch(START, whole.mean[0], whole.var[0], float(whole.count[0]), momentum=0.3)
    running = update_running_pooled(START, moments(x, mask, group_size=2), momentum=0.3)
    np.testing.assert_allclose(running.mean, expected.mean, rtol=1e-13)
    np.testing.assert_allclose(running.var, expected.var, rtol=1e-13)


@pytest.mark.parametrize("mask", MASKS, ids=["all", "masked"])
def test_groups_in_turn_are_torchs_batches_one_after_the_other(mask: np.ndarray | None) -> None:
    x = batch_of(9)
    layer = torch.nn.BatchNorm1d(3, momentum=0.3, dtype=torch.float64)
    layer.running_mean.copy_(torch.from_numpy(START.mean))
    layer.running_var.copy_(torch.from_numpy(START.var))
    for first in range(0, 9, 2):
        group = x[first : first + 2] if mask is None else x[first : first + 2][mask[first : first + 2]]
        if len(group) > 1:
            layer(torch.from_numpy(group))
    running = update_running_sequential(START, moments(x, mask, group_size=2), momentum=0.3)
    np.testing.assert_allclose(running.mean, layer.running_mean.numpy(), rtol=1e-13)
    np.testing.assert_allclose(running.var, layer.running_var.numpy(), rtol=1e-13)


def test_no_group_with_two_values_moves_anything_in_turn() -> None:
    ones = moments(batch_of(4), group_size=1)
    assert update_running_sequential(START, ones) is START
    assert update_running_pooled(START, ones) is not START
