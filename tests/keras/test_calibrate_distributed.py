"""`batchnorm.keras.calibrate` on models that live on several devices, and in torch's modules."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from batchnorm.keras import BatchNormalization
from batchnorm.keras.calibrate import Calibrate, calibrate

from .calibrated import assert_statistics, numbers, value

X = numbers(66, 3)
Y = X[:, :1]


def _model() -> keras.Sequential:
    norms = BatchNormalization(synchronized=True), layers.BatchNormalization()
    model = keras.Sequential([keras.Input((3,)), norms[0], layers.Dense(2), norms[1], layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def _assert_calibrates(model: keras.Model) -> None:
    """The same as the same weights on one device."""
    twin = _model()
    twin.set_weights(model.get_weights())
    assert calibrate(model, X, batch_size=33, verbose=0).samples == 66
    assert_statistics(model.layers[0], X)
    calibrate(twin, X, batch_size=33, verbose=0)
    for found, expected in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_tensorflow_strategy(strategy: Any) -> None:
    with strategy.scope():
        model = _model()
    model.fit(X, Y, epochs=1, batch_size=22, verbose=0, callbacks=[Calibrate(X, when="validation")])
    assert_statistics(model.layers[0], X)
    moved = model.layers[0].moving_mean
    moved.assign(np.zeros(3))
    _assert_calibrates(model)
    for copy in moved.value.values:  # every replica's
        np.testing.assert_array_equal(copy.numpy(), value(moved))
    moved.assign(np.zeros(3))
    with strategy.scope():
        calibrate(model, X, batch_size=33, verbose=0)
    assert_statistics(model.layers[0], X)
    model.fit(X, Y, batch_size=22, verbose=0)


def test_jax_distribution(backend: str) -> None:
    if backend != "jax":
        pytest.skip("keras.distribution is JAX's")
    import jax

    before = keras.distribution.distribution()
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=jax.devices("cpu")[:2]))
    try:
        model = _model()
        model.fit(X, Y, batch_size=22, verbose=0, callbacks=[Calibrate(X)])
        assert_statistics(model.layers[0], X)
        _assert_calibrates(model)
        calibrate(model, jax.device_put(X, jax.devices()[1]), verbose=0)
        assert_statistics(model.layers[0], X)
        assert len(model.layers[0].moving_mean.value.sharding.device_set) == 2
        model.fit(X, Y, batch_size=22, verbose=0)
    finally:
        keras.distribution.set_distribution(before)


def test_torch_modules_are_in_evaluation_and_then_as_before(backend: str) -> None:
    if backend != "torch":
        pytest.skip("torch's modules live on its own backend")
    import torch

    class Watching(torch.nn.Dropout):
        graphs = False

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            self.graphs = torch.is_grad_enabled()
            return super().forward(input)

    class Mixed(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.drop = Watching(0.5)
            self.norm = BatchNormalization()

        def call(self, x: Any) -> Any:
            return self.norm(torch.nn.functional.dropout(self.drop(x), training=self.training))

    model = Mixed()
    model(X)
    model.train()
    model.norm.eval()
    calibrate(model, X, batch_size=33, verbose=0)
    assert_statistics(model.norm, X)
    assert [model.training, model.drop.training, model.norm.training] == [True, True, False]
    assert not model.drop.module.graphs
