"""Errors: the type, the value received, the layer, the remedy; and that nothing has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import functional
from batchnorm.errors import BatchNormError, InputShapeError, InputTypeError, OptionError
from tests.torch.recorded import KINDS
from tests.torch.twins import assert_identical, scramble, state


class Block(nn.Module):
    """A module of the user's own, with the layer two levels down; `blocks.1.norm` in a Sequential of two."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        return self.norm(x, *residual)


class Model(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), Block(norm)])

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.blocks[1](*tensors)


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


# name: (kind, keyword arguments of the layer, inputs, error, the built-in that stock raises, text, remedy)
ERRORS: dict[str, tuple[str, dict[str, Any], tuple[Tensor, ...], type, type, str, str]] = {
    "rank-1d": (
        "BatchNorm1d", {}, (ones(2, 5, 3, 3),), InputShapeError, ValueError,
        r"expected 2D or 3D input \(got 4D input of shape \[2, 5, 3, 3\]\)", "BatchNorm2d takes that",
    ),
    "rank-2d": (
        "BatchNorm2d", {}, (ones(5, 5),), InputShapeError, ValueError,
        r"expected 4D input \(got 2D input of shape \[5, 5\]\)", "BatchNorm1d takes that",
    ),
    "rank-3d": (
        "BatchNorm3d", {}, (ones(2, 5, 3, 3),), InputShapeError, ValueError,
        r"expected 5D input \(got 4D input of shape \[2, 5, 3, 3\]\)", "BatchNorm2d takes that",
    ),
    "channels": (
        "BatchNorm2d", {}, (ones(2, 4, 3, 3),), InputShapeError, RuntimeError,
        r"running_mean should contain 4 elements not 5.*shape \[2, 4, 3, 3\]", r"4 channels \(axis 1\)",
    ),
    "channels-untracked": (
        "BatchNorm2d", {"track_running_stats": False}, (ones(2, 4, 3, 3),), InputShapeError, RuntimeError,
        r"weight should contain 4 elements not 5.*shape \[2, 4, 3, 3\]", r"4 channels \(axis 1\)",
    ),
    "one-value": (
        "BatchNorm1d", {}, (ones(1, 5),), InputShapeError, ValueError,
        r"Expected more than 1 value per channel when training, got input size .*\[1, 5\]", "drop_last=True",
    ),
    "integers": (
        "BatchNorm1d", {}, (ones(3, 5, dtype=torch.int64),), InputTypeError, RuntimeError,
        "got int64", r"\.float\(\)",
    ),
    "complex": (
        "BatchNorm1d", {}, (ones(3, 5, dtype=torch.complex64),), InputTypeError, RuntimeError,
        "got complex64", "",
    ),
    "mixed-dtypes": (
        "BatchNorm1d", {}, (ones(3, 5, dtype=torch.float64),), InputTypeError, RuntimeError,
        "weight is float32 and the input is float64", r"\.to\(dtype\)",
    ),
    "other-device": (
        "BatchNorm1d", {}, (ones(3, 5, device="meta"),), InputTypeError, RuntimeError,
        "running_mean is on cpu and the input on meta", r"\.to\(\)",
    ),
    "eps-zero": (
        "BatchNorm1d", {"eps": 0.0}, (ones(3, 5),), OptionError, ValueError,
        "eps must be positive during training, but got 0.0", "1e-5",
    ),
    "eps-negative": (
        "BatchNorm1d", {"eps": -1.0}, (ones(3, 5),), OptionError, ValueError,
        "eps must be positive during training, but got -1.0", "1e-5",
    ),
    "residual-shape": (
        "BatchNorm1d", {}, (ones(3, 5), ones(3, 1)), InputShapeError, ValueError,
        r"residual has shape \[3, 1\] and the input \[3, 5\]", "they must be equal",
    ),
    "residual-dtype": (
        "BatchNorm1d", {}, (ones(3, 5), ones(3, 5, dtype=torch.int32)), InputTypeError, TypeError,
        "residual is int32 on cpu", "must be floating-point",
    ),
    "residual-device": (
        "BatchNorm1d", {}, (ones(3, 5), ones(3, 5, device="meta")), InputTypeError, RuntimeError,
        "residual is float32 on meta", "on the same device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_layer_errors(name: str) -> None:
    kind, options, tensors, error, builtin, received, remedy = ERRORS[name]
    layer = scramble(getattr(batchnorm, kind)(5, **options))
    before = state(layer)
    for model, where in ((layer, kind), (Model(layer), rf"blocks\.1\.norm \({kind}\)")):
        with pytest.raises(error, match=rf"^{where}: .*{received}.*{remedy}") as caught:
            model(*tensors)
        assert isinstance(caught.value, (builtin, BatchNormError))
        assert isinstance(caught.value, builtin)
        assert caught.value.__cause__ is None
        assert_identical(state(layer), before)


# Stock takes no residual, and runs a meta input through a layer on the CPU.
@pytest.mark.parametrize(
    "name", [name for name in ERRORS if "residual" not in name and name != "other-device"]
)
def test_stock_raises_the_built_in_type_too(name: str) -> None:
    """The table's built-in is what code written for the stock layer catches, where stock refuses at all."""
    kind, options, tensors, _, builtin, _, _ = ERRORS[name]
    layer = getattr(nn, kind)(5, **options)
    with pytest.raises(builtin):
        layer(*tensors)


@pytest.mark.parametrize("name", ERRORS)
def test_evaluation_errors_change_nothing_either(name: str) -> None:
    kind, options, tensors, error, *_ = ERRORS[name]
    layer = scramble(getattr(batchnorm, kind)(5, **options)).eval()
    before = state(layer)
    if name in ("one-value", "eps-zero"):
        layer(*tensors)
    else:
        with pytest.raises(error):
            layer(*tensors)
    assert_identical(state(layer), before)


def test_names_within_sequential() -> None:
    features = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity(), batchnorm.BatchNorm2d(5))
    model = nn.Sequential()
    model.add_module("features", features)
    with pytest.raises(InputShapeError, match=r"^features\.3 \(BatchNorm2d\): expected 4D"):
        model(torch.ones(3, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_activation_is_refused_by_the_constructor(kind: str) -> None:
    with pytest.raises(OptionError, match=r"one of relu, relu6, .*elu; got 'swish'") as caught:
        getattr(batchnorm, kind)(5, activation="swish")
    assert isinstance(caught.value, ValueError)


def test_a_wrong_activation_set_later_is_refused_too() -> None:
    layer = scramble(batchnorm.BatchNorm1d(5))
    layer.activation = "swish"
    before = state(layer)
    with pytest.raises(OptionError, match=r"^BatchNorm1d: activation must be .* got 'swish'"):
        layer(torch.ones(3, 5))
    assert_identical(state(layer), before)


@pytest.mark.parametrize("function", [functional.batch_norm, functional.pure_batch_norm])
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((ones(3, 5), None, None), OptionError, r"running_mean and running_var.*None.*training=True"),
        ((ones(3, 5), ones(5), None), OptionError, r"running_mean and running_var.*None.*training=True"),
        ((ones(5), ones(5), ones(5)), InputShapeError, r"shape \[5\].*unsqueeze\(0\)"),
        ((ones(3, 5), ones(4), ones(5)), InputShapeError, "running_mean should contain 5 elements not 4"),
        ((ones(3, 5), ones(5), ones(4)), InputShapeError, "running_var should contain 5 elements not 4"),
        ((ones(3, 5), ones(5), ones(5), ones(4)), InputShapeError, "weight should contain 5 elements not 4"),
        (
            (ones(3, 5), ones(5), ones(5), None, ones(4)), InputShapeError,
            "bias should contain 5 elements not 4",
        ),
        (
            (ones(3, 5), ones(5, dtype=torch.int64), ones(5)), InputTypeError,
            "running_mean is int64: running statistics are floating-point",
        ),
        (
            (ones(3, 5), ones(5), ones(5), None, None, False, 0.1, -1.0), OptionError,
            "eps must be non-negative, but got -1.0",
        ),
    ],
)  # fmt: skip
def test_function_errors(function: Any, arguments: tuple[Any, ...], error: type, text: str) -> None:
    before = [t.clone() for t in arguments if isinstance(t, Tensor)]
    with pytest.raises(error, match=text):
        function(*arguments)
    after = [t for t in arguments if isinstance(t, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("wrong", ["running_mean", "running_var", "weight", "bias", "residual"])
def test_an_error_in_the_last_argument_leaves_the_first_alone(wrong: str) -> None:
    """All arguments are checked before anything moves."""
    arguments: dict[str, Any] = {
        name: torch.rand(5) for name in ("running_mean", "running_var", "weight", "bias")
    } | {"residual": torch.rand(6, 5)}
    arguments[wrong] = torch.rand(3)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    with pytest.raises(InputShapeError, match=wrong):
        functional.batch_norm(torch.rand(6, 5), **arguments, training=True)
    assert_identical(arguments, before)


def test_statistics_move_both_or_neither() -> None:
    """The second cannot be written: all its values lie in one place in memory."""
    mean, var = torch.rand(5), torch.rand(1).expand(5)
    before = mean.clone()
    with pytest.raises(RuntimeError, match="single memory location"):
        functional.batch_norm(torch.rand(6, 5), mean, var, training=True)
    assert torch.equal(mean, before)
