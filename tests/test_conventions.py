"""Settings and state from torch to Keras, as far as no Keras is needed; tests/keras has the rest."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm import conventions
from batchnorm.errors import OptionError
from batchnorm.kernels.activations import ACTIVATIONS

from .test_light_import import imported_by

CHANNELS = 3


def scrambled(layer: nn.Module) -> nn.Module:
    """The layer with random state away from 0 and 1."""
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if name != "num_batches_tracked":
                tensor.copy_(torch.rand(CHANNELS) + 0.5)
    return layer


def test_import_is_light_and_a_torch_layer_needs_no_keras() -> None:
    assert imported_by("import batchnorm.conventions") == set()
    converted = imported_by(
        "import torch, batchnorm\nbatchnorm.conventions.torch_to_keras(torch.nn.BatchNorm2d(3))"
    )
    assert not converted & {"keras", "tensorflow", "jax"}


@pytest.mark.parametrize(("torch_side", "keras_side"), [(0.1, 0.9), (0.01, 0.99), (0.003, 0.997), (0, 1)])
def test_momentum_is_the_other_part_of_one(torch_side: float, keras_side: float) -> None:
    assert conventions.opposite_momentum(torch_side) == keras_side
    assert conventions.opposite_momentum(keras_side) == torch_side


@given(st.integers(0, 10**15), st.integers(0, 15))
def test_momentum_there_and_back_is_the_same_number(digits: int, decimals: int) -> None:
    momentum = min(float(f"{digits}e-{decimals}"), 1.0)
    there = conventions.opposite_momentum(momentum)
    assert there == pytest.approx(1 - momentum, abs=2e-16)
    assert conventions.opposite_momentum(there) == momentum


@pytest.mark.parametrize("home", [nn, batchnorm])
def test_settings_of_a_default_layer(home: Any) -> None:
    settings, _ = conventions.torch_to_keras(home.BatchNorm2d(CHANNELS))
    assert settings == {
        "axis": -1,
        "momentum": 0.9,
        "epsilon": 1e-5,
        "center": True,
        "scale": True,
        "dtype": "float32",
    }
    assert conventions.torch_to_keras(home.BatchNorm2d(CHANNELS), axis=1)[0]["axis"] == 1


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ("weight", "bias", "running_mean", "running_var")),
        ({"bias": False}, ("weight", "running_mean", "running_var")),
        ({"affine": False}, ("running_mean", "running_var")),
    ],
)
def test_weights_are_those_of_the_layer_in_the_order_of_keras(
    options: dict[str, bool], names: tuple[str, ...]
) -> None:
    layer = scrambled(batchnorm.BatchNorm1d(CHANNELS, **options))
    settings, weights = conventions.torch_to_keras(layer)
    assert (settings["scale"], settings["center"]) == ("weight" in names, "bias" in names)
    assert len(weights) == len(names)
    for name, values in zip(names, weights, strict=True):
        np.testing.assert_array_equal(values, getattr(layer, name).detach().numpy(), err_msg=name)


def test_bias_without_weight_is_center_without_scale() -> None:
    layer = scrambled(nn.BatchNorm1d(CHANNELS))
    layer.register_parameter("weight", None)
    settings, weights = conventions.torch_to_keras(layer)
    assert (settings["scale"], settings["center"], len(weights)) == (False, True, 3)


def test_weights_share_no_memory_with_the_layer() -> None:
    for dtype in (torch.float32, torch.float64):
        layer = scrambled(nn.BatchNorm1d(CHANNELS, dtype=dtype))
        before = copy.deepcopy(layer.state_dict())
        for values in conventions.torch_to_keras(layer)[1]:
            values += 1
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("layer", "policy", "array_dtype"),
    [
        (nn.BatchNorm1d(3, dtype=torch.float64), "float64", "float64"),
        (nn.BatchNorm1d(3).bfloat16(), "bfloat16", "float32"),
        (nn.BatchNorm1d(3).half(), "float16", "float32"),
        (nn.BatchNorm1d(3, affine=False).bfloat16(), "bfloat16", "float32"),
        # Ours keep running statistics float32, as Keras's mixed policies do.
        (batchnorm.BatchNorm1d(3).bfloat16(), "mixed_bfloat16", "float32"),
        (batchnorm.BatchNorm1d(3, bias=False).half(), "mixed_float16", "float32"),
        (batchnorm.BatchNorm1d(3, affine=False).bfloat16(), "float32", "float32"),
    ],
)
def test_dtype_is_the_layers_own(layer: nn.Module, policy: str, array_dtype: str) -> None:
    settings, weights = conventions.torch_to_keras(layer)
    assert settings["dtype"] == policy
    assert {str(values.dtype) for values in weights} == {array_dtype}


def test_synchronized_layer_stays_synchronized() -> None:
    assert conventions.torch_to_keras(nn.SyncBatchNorm(CHANNELS))[0]["synchronized"] is True


def test_row_31_samples_rescale_the_variance_and_nothing_else() -> None:
    """Serves row 31: the unbiased running variance, ÷ (n - 1), becomes Keras's biased one, ÷ n."""
    layer = scrambled(nn.BatchNorm1d(CHANNELS))
    *others, copied = conventions.torch_to_keras(layer)[1]
    *same, biased = conventions.torch_to_keras(layer, samples=4)[1]
    np.testing.assert_array_equal(copied, layer.running_var.numpy())
    np.testing.assert_allclose(biased, layer.running_var.numpy() * 0.75, rtol=1e-7)
    for one, other in zip(others, same, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_activation_but_one_is_converted() -> None:
    for name in set(ACTIVATIONS) - {"leaky_relu"}:
        layer = batchnorm.BatchNorm1d(CHANNELS, activation=name)
        assert conventions.torch_to_keras(layer)[0]["activation"], name


def test_leaky_relu_is_refused_and_the_remedy_works() -> None:
    layer = batchnorm.BatchNorm1d(CHANNELS, activation="leaky_relu")
    with pytest.raises(OptionError, match=r"'leaky_relu'.*layer\.activation = None.*LeakyReLU\(0\.01\)"):
        conventions.torch_to_keras(layer)
    layer.activation = None
    assert "activation" not in conventions.torch_to_keras(layer)[0]


class Foreign(nn.BatchNorm1d):
    """A user's layer with an activation of its own."""

    activation = "mish"


def with_group() -> nn.Module:
    layer = nn.SyncBatchNorm(CHANNELS)
    layer.process_group = object()
    return layer


@pytest.mark.parametrize(
    ("layer", "named", "remedy"),
    [
        (nn.BatchNorm2d(CHANNELS, momentum=None), "BatchNorm2d: momentum=None", "set layer.momentum"),
        (
            nn.BatchNorm1d(CHANNELS, track_running_stats=False),
            "BatchNorm1d: track_running_stats=False",
            "batchnorm.calibrate",
        ),
        (nn.LazyBatchNorm1d(), "LazyBatchNorm1d: the layer has no values", "call it on a batch"),
        (nn.BatchNorm1d(CHANNELS, device="meta"), "BatchNorm1d: the layer has no values", "load its state"),
        (with_group(), "SyncBatchNorm: .*process group", "set layer.process_group = None"),
        (Foreign(CHANNELS), "Foreign: activation='mish'", "behind the layer$"),
        (nn.InstanceNorm1d(CHANNELS), r"got a torch\.nn\..*\.InstanceNorm1d", "takes a BatchNorm1d"),
        ("BatchNorm1d", r"got a builtins\.str", "takes a BatchNorm1d"),
    ],
)
def test_what_keras_cannot_express_is_refused_by_name(layer: Any, named: str, remedy: str) -> None:
    with pytest.raises(OptionError, match=named) as caught:
        conventions.torch_to_keras(layer)
    caught.match(remedy)


@pytest.mark.parametrize("samples", [1, 0, -3, 2.0, "8", True])
def test_samples_is_a_whole_number_from_two_on(samples: Any) -> None:
    for convert in (conventions.torch_to_keras, conventions.keras_to_torch):
        with pytest.raises(OptionError, match=r"2 or more; got"):
            convert(nn.BatchNorm1d(CHANNELS), samples=samples)
    assert conventions.torch_to_keras(nn.BatchNorm1d(CHANNELS), samples=np.int64(2))


def test_a_torch_layer_is_no_keras_layer() -> None:
    with pytest.raises(OptionError, match=r"takes a keras\.layers\.BatchNormalization .*\.BatchNorm1d"):
        conventions.keras_to_torch(nn.BatchNorm1d(CHANNELS))
