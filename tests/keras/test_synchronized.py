"""Replicas share their statistics, by the numbers of their valid values; row 22 of the user pains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import torch

from batchnorm.keras import BatchNormalization
from tests.support.compare import assert_close

from .gradients import Array
from .oracle import oracle
from .replicas import step_on
from .test_numbers import MOMENTUM, draw, made, numbers

F32 = torch.float32
MASKS = ["none", "uneven", "one-empty"]


def inputs(masks: str, offset: float) -> tuple[list[Array], list[Array], list[Array] | None]:
    """x, dy and mask of two replicas, of very different means; `[3, 4, 5]` each."""
    xs = [draw((3, 4, 5), 1, offset), draw((3, 4, 5), 2, offset + 3)]
    dys = [draw((3, 4, 5), seed) for seed in (3, 4)]
    if masks == "none":
        return xs, dys, None
    random = np.random.default_rng(5)
    second = np.zeros((3, 4), bool) if masks == "one-empty" else random.random((3, 4)) < 0.2
    return xs, dys, [random.random((3, 4)) < 0.8, second]


def expect(
    layer: Any, xs: list[Array], dys: list[Array], masks: list[Array] | None
) -> tuple[Any, Array, Array]:
    """The results of one process over the concatenated batch, and the moving statistics after it."""
    counts = None if masks is None else np.repeat(np.concatenate(masks)[..., None], 5, axis=-1)
    found, mean, var = oracle(numbers(layer), np.concatenate(xs), np.concatenate(dys), -1, counts)
    old_mean, old_var = (weight.numpy() for weight in layer.weights[2:])
    moved = (MOMENTUM * old + (1 - MOMENTUM) * batch for old, batch in ((old_mean, mean), (old_var, var)))
    return found, *moved


@pytest.mark.on_every_backend
@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("masks", MASKS)
def test_row_22_on_tensorflows_strategies(strategy: Any, masks: str, offset: float) -> None:
    with strategy.scope():
        layer = made(5, -1, 3, synchronized=True)
    xs, dys, given = inputs(masks, offset)
    expected, mean, var = expect(layer, xs, dys, given)

    y, dx, dgamma, dbeta = step_on(strategy, layer, xs, dys, given)
    assert_close(np.concatenate(y), expected.y, dtype=F32, what="y")
    assert_close(np.concatenate(dx), expected.dx, dtype=F32, what="dx")
    assert_close(sum(dgamma), expected.dgamma, dtype=F32, what="dgamma")
    assert_close(sum(dbeta), expected.dbeta, dtype=F32, what="dbeta")
    for variable, value in ((layer.moving_mean, mean), (layer.moving_variance, var)):
        assert_close(variable.numpy(), value, dtype=F32, what=variable.name)


@pytest.mark.on_every_backend
def test_row_22_fit_in_a_strategy(strategy: Any) -> None:
    x = draw((8, 4, 5), 1, 2.0)
    x[4:] += 5
    x[::2, 2:] = 0.0  # masked
    with strategy.scope():
        norm = BatchNormalization(momentum=0.0, synchronized=True)
        model = keras.Sequential([keras.Input((4, 5)), keras.layers.Masking(), norm])
        model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, x, batch_size=8, shuffle=False, verbose=0)
    values = x[(x != 0).any(-1)].astype(float)
    assert_close(norm.moving_mean.numpy(), values.mean(0), dtype=F32, what="moving_mean")
    assert_close(norm.moving_variance.numpy(), values.var(0), dtype=F32, what="moving_variance")


@pytest.fixture
def two_devices() -> Iterator[Any]:
    distribution = keras.distribution.DataParallel(devices=keras.distribution.list_devices("cpu")[:2])
    keras.distribution.set_distribution(distribution)
    yield distribution
    keras.distribution.set_distribution(None)


@pytest.mark.on_every_backend
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="a way of the jax backend")
@pytest.mark.parametrize("synchronized", [True, False])
def test_row_22_on_jaxs_distribution_api(two_devices: Any, synchronized: bool) -> None:
    x = draw((8, 4, 5), 1, 2.0)
    x[4:] += 5
    x[::2, 2:] = 0.0  # masked
    norm = BatchNormalization(momentum=0.0, synchronized=synchronized)
    model = keras.Sequential([keras.Input((4, 5)), keras.layers.Masking(), norm])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    assert two_devices.device_mesh.shape == (2,)
    model.fit(x, x, batch_size=8, shuffle=False, verbose=0)
    values = x[(x != 0).any(-1)].astype(float)
    assert_close(norm.moving_mean.numpy(), values.mean(0), dtype=F32, what="moving_mean")
    assert_close(norm.moving_variance.numpy(), values.var(0), dtype=F32, what="moving_variance")


@pytest.mark.on_every_backend
def test_one_process_needs_no_group() -> None:
    x = draw((6, 4, 5), 1, 2.0)
    alone, shared = made(5, -1, 3), made(5, -1, 3, synchronized=True)
    ours, theirs = (keras.ops.convert_to_numpy(layer(x, training=True)) for layer in (alone, shared))
    assert_close(ours, theirs, dtype=F32, what="y")
    assert shared.get_config()["synchronized"] is True
