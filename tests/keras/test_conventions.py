"""A torch layer and a Keras layer with converted state compute the same, both ways, stock and ours."""

from __future__ import annotations

import sys
from typing import Any

import keras
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import batchnorm
from batchnorm import conventions, reference
from batchnorm.errors import MissingExtraError, OptionError
from batchnorm.keras import BatchNormalization
from tests.support.compare import assert_close

Array = NDArray[np.float32]

KERAS = [
    pytest.param(keras.layers.BatchNormalization, id="stock-keras"),
    pytest.param(BatchNormalization, id="our-keras"),
]
TORCH = [pytest.param(nn, id="stock-torch"), pytest.param(batchnorm, id="our-torch")]
# Channels-first shapes with one torch layer for each.
SHAPES = [
    ("BatchNorm1d", (9, 5)),
    ("BatchNorm1d", (4, 5, 7)),
    ("BatchNorm2d", (3, 5, 4, 6)),
    ("BatchNorm3d", (2, 5, 3, 4, 2)),
]
RANDOM_STATE = ("weight", "bias", "running_mean", "running_var")


def values(shape: tuple[int, ...], seed: int) -> Array:
    return (np.random.default_rng(seed).normal(0.7, 1.5, shape)).astype("float32")


def positive(seed: int, channels: int = 5) -> Array:
    return np.random.default_rng(seed).uniform(0.4, 2.5, channels).astype("float32")


def torch_layer(home: Any, kind: str, **options: Any) -> Any:
    layer = getattr(home, kind)(5, eps=0.02, **{"momentum": 0.2, **options}).eval()
    with torch.no_grad():
        for seed, name in enumerate(RANDOM_STATE):
            if getattr(layer, name) is not None:
                getattr(layer, name).copy_(torch.tensor(positive(seed)))
    return layer


def keras_layer(keras_class: Any, ndim: int, axis: int = -1, **options: Any) -> Any:
    layer = keras_class(axis=axis, **{"momentum": 0.8, "epsilon": 0.02, **options})
    layer.build(built_for(ndim, axis))
    layer.set_weights([positive(seed) for seed, _ in enumerate(layer.weights)])
    return layer


def built_for(ndim: int, axis: int) -> tuple[int | None, ...]:
    shape: list[int | None] = [None] * ndim
    shape[axis] = 5
    return tuple(shape)


def to_keras(layer: Any, keras_class: Any, ndim: int, axis: int = -1, samples: int | None = None) -> Any:
    settings, weights = conventions.torch_to_keras(layer, axis=axis, samples=samples)
    converted = keras_class(**settings)
    converted.build(built_for(ndim, axis))
    converted.set_weights(weights)
    return converted


def to_torch(layer: Any, home: Any, kind: str, samples: int | None = None) -> Any:
    settings, state = conventions.keras_to_torch(layer, samples=samples)
    converted = getattr(home, kind)(**settings).eval()
    converted.load_state_dict(state)  # strict
    return converted


def run_keras(layer: Any, x: Array, training: bool = False) -> Array:
    """The Keras layer's output for channels-first x, channels first."""
    last = layer.axis == -1
    y = layer(np.ascontiguousarray(np.moveaxis(x, 1, -1)) if last else x, training=training)
    y = keras.ops.convert_to_numpy(y)
    return np.moveaxis(y, -1, 1) if last else y


def run_torch(layer: Any, x: Array) -> Array:
    with torch.no_grad():
        return layer(torch.tensor(x)).numpy()


def expected(x: Array, *state: Array | None, activation: str | None = None) -> Array:
    """float64: weight, bias, mean, var."""
    weight, bias, mean, var = (None if value is None else np.float64(value) for value in state)
    options = {"eps": 0.02, "activation": activation}
    return reference.forward(np.float64(x), weight, bias, mean=mean, var=var, **options).y


def state_of(layer: Any) -> list[Array]:
    """weight, bias, mean, var of either kind."""
    if isinstance(layer, nn.Module) and not isinstance(layer, keras.Layer):
        return [getattr(layer, name).detach().numpy().copy() for name in RANDOM_STATE]
    weights = (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
    return [keras.ops.convert_to_numpy(weight).copy() for weight in weights]


@pytest.mark.parametrize("axis", [1, -1], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize("keras_class", KERAS)
@pytest.mark.parametrize("home", TORCH)
def test_row_31_outputs_in_evaluation_are_equal_both_ways(
    home: Any, keras_class: Any, kind: str, shape: tuple[int, ...], axis: int
) -> None:
    """Serves row 31: the variance is copied unchanged, whichever of the two estimators it came from."""
    x, state = values(shape, 7), [positive(seed) for seed in range(4)]
    y = expected(x, *state)

    from_torch = to_keras(torch_layer(home, kind), keras_class, len(shape), axis)
    assert_close(run_keras(from_torch, x), y, dtype=torch.float32, what="torch to Keras")
    from_keras = to_torch(keras_layer(keras_class, len(shape), axis), home, kind)
    assert_close(run_torch(from_keras, x), y, dtype=torch.float32, what="Keras to torch")

    for converted in (from_torch, from_keras):
        for before, after in zip(state, state_of(converted), strict=True):
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("keras_class", KERAS)
@pytest.mark.parametrize("home", TORCH)
def test_row_31_training_goes_on_alike_with_samples(home: Any, keras_class: Any) -> None:
    """Serves row 31: with samples=n, both layers' statistics go the same way, over batches of n values."""
    shape, n = (4, 5, 3, 2), 4 * 3 * 2
    started_in_torch, started_in_keras = torch_layer(home, "BatchNorm2d"), keras_layer(keras_class, 4)
    pairs = [
        (started_in_torch, to_keras(started_in_torch, keras_class, 4, samples=n)),
        (to_torch(started_in_keras, home, "BatchNorm2d", samples=n), started_in_keras),
    ]
    for torch_side, keras_side in pairs:
        torch_side.train()
        for seed in range(3):
            x = values(shape, seed)
            run_torch(torch_side, x)
            run_keras(keras_side, x, training=True)
        *_, mean, var_unbiased = state_of(torch_side)
        *_, moving_mean, var = state_of(keras_side)
        np.testing.assert_allclose(moving_mean, mean, rtol=2e-6)
        np.testing.assert_allclose(var, var_unbiased * (n - 1) / n, rtol=2e-6)
        back = to_torch(keras_side, home, "BatchNorm2d", samples=n)
        np.testing.assert_allclose(back.running_var, var_unbiased, rtol=2e-6)


@pytest.mark.parametrize("keras_class", KERAS)
@pytest.mark.parametrize("home", TORCH)
def test_there_and_back_is_the_same_layer(home: Any, keras_class: Any) -> None:
    before = torch_layer(home, "BatchNorm2d", momentum=0.1)
    after = to_torch(to_keras(before, keras_class, 4), home, "BatchNorm2d")
    assert (after.eps, after.momentum, repr(after)) == (before.eps, before.momentum, repr(before))
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
        assert after.state_dict()[name].dtype == tensor.dtype, name

    first = keras_layer(keras_class, 4, momentum=0.99)
    last = to_keras(to_torch(first, home, "BatchNorm2d"), keras_class, 4)
    assert {**last.get_config(), "name": first.name} == first.get_config()
    for one, other in zip(first.get_weights(), last.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("keras_class", KERAS)
@pytest.mark.parametrize("home", TORCH)
@pytest.mark.parametrize(("scale", "center"), [(True, True), (True, False), (False, True), (False, False)])
def test_scale_and_center(home: Any, keras_class: Any, scale: bool, center: bool) -> None:
    x = values((3, 5, 4, 6), 3)
    layer = keras_layer(keras_class, 4, scale=scale, center=center)
    gamma, beta, mean, var = (
        None if weight is None else keras.ops.convert_to_numpy(weight)
        for weight in (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
    )
    converted = to_torch(layer, home, "BatchNorm2d")
    y = expected(x, gamma, beta, mean, var)
    assert_close(run_torch(converted, x), y, dtype=torch.float32, what="Keras to torch")
    assert (converted.affine, converted.bias is not None) == (scale or center, center)
    if center and not scale:
        assert torch.equal(converted.weight, torch.ones(5))
    back = to_keras(converted, keras_class, 4)
    assert_close(run_keras(back, x), y, dtype=torch.float32, what="and back")
    assert (back.scale, back.center) == (scale or center, center)


@pytest.mark.parametrize(
    "name", ["relu", "relu6", "silu", "gelu", "hardswish", "sigmoid", "tanh", "elu", None]
)
def test_activations_are_the_same_function(name: str | None) -> None:
    x, state = 3 * values((3, 5, 4, 6), 4), [positive(seed) for seed in range(4)]
    y = expected(x, *state, activation=name)
    from_torch = to_keras(torch_layer(batchnorm, "BatchNorm2d", activation=name), BatchNormalization, 4)
    assert_close(run_keras(from_torch, x), y, dtype=torch.float32, what="torch to Keras")
    from_keras = to_torch(from_torch, batchnorm, "BatchNorm2d")
    assert from_keras.activation == name
    assert_close(run_torch(from_keras, x), y, dtype=torch.float32, what="Keras to torch")


@pytest.mark.parametrize("keras_class", KERAS)
@pytest.mark.parametrize(
    ("policy", "dtype"),
    [
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("mixed_bfloat16", torch.float32),
    ],
)
def test_dtype_is_that_of_the_variables(keras_class: Any, policy: str, dtype: torch.dtype) -> None:
    layer = keras_layer(keras_class, 2, dtype=policy)
    settings, state = conventions.keras_to_torch(layer)
    assert settings["dtype"] == dtype
    for name, weight in zip(RANDOM_STATE, layer.weights, strict=True):
        assert state[name].dtype == getattr(torch, weight.dtype)
        exact = keras.ops.convert_to_numpy(weight).astype("float64")
        np.testing.assert_array_equal(state[name].double().numpy(), exact)
    stock = to_torch(layer, nn, "BatchNorm1d")
    assert stock.weight.dtype == stock.running_var.dtype == dtype


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="by default, JAX has no float64")
def test_float64_stays_float64() -> None:
    layer = keras_layer(BatchNormalization, 2, dtype="float64")
    layer.moving_mean.assign(np.full(5, 1 / 3))
    settings, state = conventions.keras_to_torch(layer)
    assert settings["dtype"] == torch.float64
    assert state["running_mean"].tolist() == [1 / 3] * 5
    back = to_keras(to_torch(layer, batchnorm, "BatchNorm1d"), BatchNormalization, 2)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(back.moving_mean), np.full(5, 1 / 3))


def test_mixed_policy_carries_16_bit_parameters_and_wide_statistics() -> None:
    layer = torch_layer(batchnorm, "BatchNorm1d").bfloat16()
    converted = to_keras(layer, BatchNormalization, 2)
    assert (converted.variable_dtype, converted.compute_dtype) == ("float32", "bfloat16")
    for name, weight in zip(RANDOM_STATE, converted.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, getattr(layer, name).detach().float().numpy())


@pytest.mark.parametrize("keras_class", KERAS)
def test_state_shares_no_memory_with_the_layer(keras_class: Any) -> None:
    layer = keras_layer(keras_class, 2)
    before = [weight.copy() for weight in layer.get_weights()]
    for tensor in conventions.keras_to_torch(layer)[1].values():
        tensor.add_(1)
    for one, other in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_state_counts_no_batches() -> None:
    tracked = conventions.keras_to_torch(keras_layer(BatchNormalization, 2))[1]["num_batches_tracked"]
    assert tracked.dtype == torch.int64
    assert tracked.item() == 0


@pytest.mark.parametrize(
    ("option", "value", "off", "remedy"),
    [
        ("renorm", True, False, "set layer.renorm = False and convert again; evaluation is the same"),
        ("synchronized", True, False, "convert_sync_batchnorm"),
        ("beta_regularizer", "l2", None, "set layer.beta_regularizer = None"),
        ("gamma_regularizer", "l2", None, "set layer.gamma_regularizer = None"),
        ("beta_constraint", "non_neg", None, "set layer.beta_constraint = None"),
        ("gamma_constraint", "non_neg", None, "set layer.gamma_constraint = None"),
        ("activation", "leaky_relu", keras.activations.linear, "behind the layer"),
        (
            "activation",
            "softmax",
            keras.activations.linear,
            "set layer.activation = keras.activations.linear",
        ),
        ("activation", lambda x: x, keras.activations.linear, "which takes relu, relu6, silu"),
    ],
)
def test_what_torch_cannot_express_is_refused_by_name_and_the_remedy_works(
    option: str, value: Any, off: Any, remedy: str
) -> None:
    layer = keras_layer(BatchNormalization, 4, name="bn_7", **{option: value})
    with pytest.raises(OptionError, match=rf"^bn_7 \(BatchNormalization\): {option}") as caught:
        conventions.keras_to_torch(layer)
    caught.match(remedy)
    setattr(layer, option, off)
    x = values((3, 5, 4, 6), 5)
    converted = to_torch(layer, batchnorm, "BatchNorm2d")
    assert_close(run_torch(converted, x), run_keras(layer, x), dtype=torch.float32, what="after the remedy")


def test_layers_without_state_are_refused() -> None:
    with pytest.raises(OptionError, match=r"^bn_8 \(BatchNormalization\): the layer is not built"):
        conventions.keras_to_torch(BatchNormalization(name="bn_8"))
    with pytest.raises(OptionError, match=r"got a keras\.src\..*\.LayerNormalization"):
        conventions.keras_to_torch(keras.layers.LayerNormalization())
    with pytest.raises(OptionError, match=r"takes a BatchNorm1d, .*got a keras\.src\."):
        conventions.torch_to_keras(keras_layer(keras.layers.BatchNormalization, 2))


def test_missing_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = keras_layer(BatchNormalization, 2)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'batchnorm\[torch\]'"):
        conventions.keras_to_torch(layer)


@pytest.mark.parametrize(
    ("name", "value"), [("nonfinite", "skip"), ("small_batch", "running"), ("warm_start", True)]
)
def test_options_that_both_have_come_along(name: str, value: str | bool) -> None:
    layer = batchnorm.keras.BatchNormalization(**{name: value})
    layer.build((None, 3))
    settings, state = conventions.keras_to_torch(layer)
    made = batchnorm.BatchNorm1d(**settings)
    made.load_state_dict(state)
    assert getattr(made, name) == value
    again, _ = conventions.torch_to_keras(made)
    assert again[name] == value
