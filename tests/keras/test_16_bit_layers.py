"""Layers of a 16-bit dtype keep their moving statistics in float32."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers, ops

import batchnorm
from batchnorm.keras import BatchNormalization

from .foldable import draw

OPTIONS: list[dict[str, Any]] = [
    {},
    {"renorm": True},
    {"statistics": batchnorm.Ghost(16)},
    {"statistics": batchnorm.Renorm()},
    {"nonfinite": "skip", "activation": "relu"},
    {"synchronized": True},
]


def array(value: Any) -> np.ndarray:
    return ops.convert_to_numpy(ops.cast(value, "float32"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_row_76_statistics_are_float32(options: dict[str, Any], dtype: str) -> None:
    """Row 76: a standard deviation of 300 has a variance beyond float16; the stock layer then gives 0."""
    layer = BatchNormalization(dtype=dtype, momentum=0.5, **options)
    wide = BatchNormalization(dtype="float32", momentum=0.5, **options)
    x = ops.cast(draw((64, 3)) * 300 + 100, dtype)
    for _ in range(20):
        y = layer(x, training=True)
        wide(ops.cast(x, "float32"), training=True)
    assert {w.dtype for w in layer.non_trainable_weights} <= {"float32", "int32"}
    assert {w.dtype for w in layer.trainable_weights} == {dtype}
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    for mine, theirs in zip(layer.non_trainable_weights, wide.non_trainable_weights, strict=True):
        np.testing.assert_allclose(array(mine.value), array(theirs.value), rtol=1e-5, atol=1e-4)
    assert array(layer.moving_variance.value).min() > 65504
    given = array(layer(x))
    np.testing.assert_allclose(given, array(wide(ops.cast(x, "float32"))), rtol=2**-7, atol=2**-7)
    assert given.std() > 0.3


def test_a_policy_of_the_process_is_one_too_and_float64_stays() -> None:
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("float16")
        layer = BatchNormalization()
        layer.build((None, 3))
    finally:
        keras.config.set_dtype_policy(before)
    assert layer.moving_variance.dtype == layer.moving_mean.dtype == "float32"
    for policy, kept in (("mixed_float16", "float32"), ("float64", "float64")):
        if policy == "float64" and keras.backend.backend() == "jax":  # which has it on request only
            continue
        layer = BatchNormalization(dtype=policy)
        layer.build((None, 3))
        assert {weight.dtype for weight in layer.weights} == {kept}


def test_weights_go_either_way_between_stock_and_ours() -> None:
    stock, ours = layers.BatchNormalization(dtype="float16"), BatchNormalization(dtype="float16")
    stock.build((None, 3))
    ours.build((None, 3))
    values = [array(draw((3,))) ** 2 + 0.5 for _ in range(4)]
    stock.set_weights(values)
    ours.set_weights(stock.get_weights())
    x = ops.cast(draw((8, 3)), "float16")
    np.testing.assert_allclose(array(ours(x)), array(stock(x)), rtol=2e-3, atol=2e-3)
    stock.set_weights(ours.get_weights())
    assert [w.dtype for w in stock.weights] == ["float16"] * 4


def test_a_torch_layer_of_it_has_the_same_variance() -> None:
    layer = BatchNormalization(dtype="float16")
    layer.build((None, 3))
    layer.moving_variance.assign(np.full(3, 1e5, "float32"))
    settings, state = batchnorm.conventions.keras_to_torch(layer)
    ours = batchnorm.BatchNorm1d(**settings)
    ours.load_state_dict(state)
    assert ours.weight.dtype == torch.float16
    assert ours.running_var.tolist() == [1e5] * 3


def test_calibrate_of_a_16_bit_model_is_finite() -> None:
    model = keras.Sequential([keras.Input((3,), dtype="float16"), BatchNormalization(dtype="float16")])
    x = (draw((64, 3)) * 300).astype("float16")
    batchnorm.keras.calibrate(model, x, verbose=0)
    wanted = x.astype("float64").var(0)
    np.testing.assert_allclose(array(model.layers[-1].moving_variance.value), wanted, rtol=1e-3)
