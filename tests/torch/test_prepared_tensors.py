"""Prepared launches run on the tensors that a layer has at that moment: copied, replaced, computed, or views.

Each call is compared with a float64 stock layer of the values that hold at that moment.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import batchnorm
from batchnorm import kernels
from tests.support.compare import assert_close
from tests.torch.prepared import (
    MODES,
    SHAPE,
    Change,
    assert_exact,
    assert_values,
    batch,
    exact_twin,
    norm,
    nothing_new_prepared,
)
from tests.torch.twins import STATISTICS, assert_identical, relaid, state, step


def saved_and_loaded(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = batchnorm.BatchNorm2d(5).train(layer.training)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "state_dict": saved_and_loaded,
}


@MODES
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_layer_that_was_called_is_equal_and_independent(way: str, training: bool) -> None:
    layer, (x, dy) = norm().train(training), batch()
    step(layer, x, dy)
    before = state(layer)
    twin = COPIES[way](layer)
    assert_identical(state(twin), before)
    with torch.no_grad():
        twin.weight.mul_(2)
        twin.running_mean.add_(1)
    assert_exact(twin, x, dy)
    assert_identical(state(layer), before)
    twin.load_state_dict(before)
    with nothing_new_prepared():
        found = step(layer, x, dy)
        assert_identical(step(twin, x, dy), found)
    assert_values(found, step(exact_with(layer, before), x.double(), dy.double()))


def exact_with(layer: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    twin = exact_twin(layer)
    twin.load_state_dict(values)
    return twin


def other_storage(layer: nn.Module) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(layer, name)
        tensor.data = tensor.data.flip(0) + 0.25


REPLACED: dict[str, Change] = {
    "weight": lambda layer: setattr(layer, "weight", nn.Parameter(torch.linspace(-2, 3, 5))),
    "no-weight": lambda layer: setattr(layer, "weight", None),
    "no-bias": lambda layer: setattr(layer, "bias", None),
    "running_mean": lambda layer: setattr(layer, "running_mean", torch.linspace(-1, 4, 5)),
    "running_var": lambda layer: setattr(layer, "running_var", torch.linspace(1, 4, 5)),
    "count": lambda layer: setattr(layer, "num_batches_tracked", torch.tensor(11)),
    "storage": other_storage,
    "swapped": lambda layer: setattr(layer, "weight", copy.deepcopy(layer.bias)),
    "strided": lambda layer: setattr(layer.weight, "data", torch.linspace(-2, 3, 10)[::2]),
    "loaded": lambda layer: layer.load_state_dict(norm().state_dict(), assign=True),
}


@MODES
@pytest.mark.parametrize("change", REPLACED)
def test_a_replaced_parameter_or_buffer_is_used(change: str, training: bool) -> None:
    layer, (x, dy) = norm().train(training), batch()
    assert_exact(layer, x, dy)
    REPLACED[change](layer)
    assert_exact(layer, x, dy)
    with nothing_new_prepared():
        assert_exact(layer, x, dy)


@MODES
def test_a_layer_of_another_dtype_and_back_again(training: bool) -> None:
    layer = norm().train(training)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float64, torch.bfloat16):
        layer.to(dtype)
        assert layer.weight.dtype is dtype
        assert_exact(layer, *batch(dtype))


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, original: Tensor) -> Tensor:
        return 2 * original


@MODES
def test_a_parametrized_weight_is_computed_anew_for_each_call(training: bool) -> None:
    layer, (x, dy) = norm().train(training), batch()
    assert_exact(layer, x, dy)
    parametrize.register_parametrization(layer, "weight", Doubled())
    original = layer.parametrizations.weight.original
    for _ in range(2):
        expected = step(exact_twin(layer), x.double(), dy.double())
        assert_exact(layer, x, dy, ("y", "dx", "dbias"))
        torch.testing.assert_close(original.grad.double(), 2 * expected["dweight"], rtol=2e-6, atol=2e-6)
        original.data.mul_(-1.5)
    parametrize.remove_parametrizations(layer, "weight")
    assert_exact(layer, x, dy)


@MODES
def test_a_weight_that_a_hook_computes_is_no_parameter_and_is_used(training: bool) -> None:
    """As with the older `torch.nn.utils.weight_norm`."""
    layer, (x, dy) = norm().train(training), batch()
    assert_exact(layer, x, dy)
    raw = nn.Parameter(layer.weight.detach() / 2)
    del layer.weight
    layer.register_parameter("raw", raw)
    layer.weight = raw * 2

    def recompute(layer: nn.Module, _: object) -> None:
        layer.weight = layer.raw * 3

    layer.register_forward_pre_hook(recompute)
    for _ in range(2):
        twin = exact_twin(layer)
        twin.weight.data = 3 * raw.detach().double()
        expected = step(twin, x.double(), dy.double())
        assert_values(step(layer, x, dy), expected, ("y", "dx", "dbias", *STATISTICS))
        torch.testing.assert_close(raw.grad.double(), 3 * expected["dweight"], rtol=2e-6, atol=2e-6)
        raw.data.mul_(-1.5)


@MODES
def test_functional_call_uses_what_it_is_given_and_moves_nothing_else(training: bool) -> None:
    layer, (x, dy) = norm().train(training), batch()
    assert_exact(layer, x, dy)
    before, given = state(layer), state(norm())
    expected_twin = exact_twin(layer)
    expected_twin.load_state_dict(given)
    expected = step(expected_twin, x.double(), dy.double())
    leaves = [given[name].requires_grad_() for name in ("weight", "bias")]
    leaf = x.clone().requires_grad_()
    y = torch.func.functional_call(layer, given, (leaf,))
    dx, dweight, dbias = torch.autograd.grad(y, [leaf, *leaves], dy)
    assert_values({"y": y, "dx": dx, "dweight": dweight, "dbias": dbias} | given, expected)
    assert_identical(state(layer), before)
    assert_exact(layer, x, dy)


GUARD = 77.0


class Storage:
    """One storage, in which views lie at odd places, with guards around each."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._memory = torch.full((4096,), GUARD).to(dtype)
        self._taken = torch.zeros(4096, dtype=torch.bool)
        self._next = 1

    def view(self, values: Tensor) -> Tensor:
        """Return a view that has the values, in their layout."""
        place = torch.as_strided(self._memory, values.shape, values.stride(), self._next)
        place.copy_(values)
        torch.as_strided(self._taken, values.shape, values.stride(), self._next).fill_(True)
        self._next += values.numel()
        self._next += 1 + self._next % 2  # one guard or two: the next offset is odd again
        return place

    def assert_guarded(self) -> None:
        """Raise if a value has been written between the views."""
        assert (self._memory[~self._taken] == GUARD).all()


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_views_at_odd_offsets_are_used_and_their_neighbours_left(
    dtype: torch.dtype, layout: str, training: bool
) -> None:
    """Parameters, buffers, input and cotangent; all of them lie in a few storages, one after the other."""
    layer = norm(dtype).train(training)
    x, dy = (relaid(t, layout) for t in batch(dtype))
    assert_exact(layer, x, dy)
    values, statistics, counts = Storage(dtype), Storage(layer.running_mean.dtype), Storage(torch.int64)
    layer.weight = nn.Parameter(values.view(layer.weight.detach()))
    layer.bias = nn.Parameter(values.view(layer.bias.detach()))
    layer.running_mean = statistics.view(layer.running_mean)
    layer.running_var = statistics.view(layer.running_var)
    layer.num_batches_tracked = counts.view(layer.num_batches_tracked)
    x, dy = values.view(x), values.view(dy)
    assert x.storage_offset() % 2 == layer.running_var.storage_offset() % 2 == 1
    before = [t.clone() for t in (x, dy, layer.weight, layer.bias)]
    assert_exact(layer, x, dy)
    with nothing_new_prepared():
        assert_exact(layer, x, dy)
    for storage in (values, statistics, counts):
        storage.assert_guarded()
    assert all(map(torch.equal, (x, dy, layer.weight, layer.bias), before))


@MODES
@pytest.mark.parametrize("engine", [None, "cpu", "eager"])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_view_with_the_neg_bit_has_the_values_that_torch_shows(
    name: str, engine: str | None, training: bool
) -> None:
    """Such as the imaginary part of a conjugated tensor: its memory holds the negatives of its values."""
    layer = norm().train(training)
    assert_exact(layer, *batch())
    view = torch._neg_view(-getattr(layer, name).detach())
    setattr(layer, name, nn.Parameter(view) if name in ("weight", "bias") else view)
    assert getattr(layer, name).is_neg()
    with contextlib.nullcontext() if engine is None else kernels.use(engine):
        assert_exact(layer, *batch())
        assert_exact(layer, *batch())


@MODES
@pytest.mark.parametrize("engine", [None, "cpu", "eager"])
@pytest.mark.parametrize("name", ["x", "residual", "dy", "weight", "bias"])
def test_a_tensor_of_zeros_without_memory_is_taken_as_zeros(
    name: str, engine: str | None, training: bool
) -> None:
    """`torch._efficientzerotensor`, of which torch makes tangents: the kernels would read address 0."""
    layer, x, residual = norm().train(training), *batch()
    dy = torch.randn_like(x)
    layer(x, residual).backward(dy)
    zeros = torch._efficientzerotensor(5 if name in ("weight", "bias") else SHAPE)
    found: list[list[Tensor]] = []
    for value in (zeros, torch.zeros(zeros.shape)):
        twin = copy.deepcopy(layer)
        tensors = {"x": x, "residual": residual, "dy": dy}
        if name in tensors:
            tensors[name] = value
        else:
            setattr(twin, name, nn.Parameter(value))
        with contextlib.nullcontext() if engine is None else kernels.use(engine):
            twin(x, residual)  # what follows may run its prepared call
            for _ in range(2):
                y = twin(tensors["x"], tensors["residual"])
                gradients = torch.autograd.grad(y, [twin.weight, twin.bias], tensors["dy"])
        found.append([y.detach(), *gradients, twin.running_mean, twin.running_var])
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


@MODES
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_that_require_grad_are_refused_as_in_stock(name: str, training: bool) -> None:
    stock, ours = nn.BatchNorm2d(5).train(training), batchnorm.BatchNorm2d(5).train(training)
    x, dy = batch()
    for layer in (stock, ours):
        layer(x).backward(dy)
        before = state(layer)
        getattr(layer, name).requires_grad_()
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=f"not differentiable with respect to.*{name}|{name}.* not "
            ):
                layer(x)
        if layer is ours:  # torch has counted the batch
            assert_identical(state(layer), before)
        with torch.no_grad():
            layer(x)
    assert_close(getattr(ours, name), getattr(stock, name).detach(), dtype=torch.float32, what=name)
