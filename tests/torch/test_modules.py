"""Drop-in, by torch's own recorded samples of the modules: ours against stock, on the same arguments."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import batchnorm
from tests.torch.recorded import KINDS, MODULE_CASES, module_errors, module_samples
from tests.torch.twins import TOLERANCES, assert_identical, assert_same, relaid, scramble, state, step, twins

CASES = pytest.mark.parametrize(
    ("kind", "index"), [pytest.param(kind, index, id=name) for kind, index, name in MODULE_CASES]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "strided", "channels_last"])


def sampled(kind: str, index: int, dtype: torch.dtype, training: bool = True) -> tuple[Any, Any, Tensor]:
    """Return the stock layer, ours, and the input, away from zero mean."""
    sample = module_samples(kind, dtype, training)[index]
    arguments = sample.constructor_input
    stock, ours = twins(kind, *arguments.args, **{**arguments.kwargs, "dtype": dtype})
    return stock.train(training), ours.train(training), sample.forward_input.args[0] * 0.3 + 2


@CASES
@DTYPES
@MODES
@LAYOUTS
def test_output_gradients_and_statistics(
    kind: str, index: int, dtype: torch.dtype, training: bool, layout: str
) -> None:
    stock, ours, x = sampled(kind, index, dtype, training)
    x = relaid(x, layout)
    dy = torch.randn_like(x)
    assert_same(step(ours, x, dy), step(stock, x, dy), TOLERANCES[dtype])


@CASES
@DTYPES
def test_two_steps_then_evaluation(kind: str, index: int, dtype: torch.dtype) -> None:
    stock, ours, x = sampled(kind, index, dtype)
    batches = [x, x.flip(0) * 2 - 1]
    for layer in (stock, ours):
        for batch in batches:
            layer(batch)
        layer.eval()
    assert_same(state(ours), state(stock), TOLERANCES[dtype])
    torch.testing.assert_close(ours(x), stock(x), rtol=2e-5, atol=2e-5)


@CASES
def test_state_dict_loads_both_ways(kind: str, index: int) -> None:
    stock, ours, _ = sampled(kind, index, torch.float32)
    scramble(ours)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert ours.state_dict()._metadata == stock.state_dict()._metadata
    stock.load_state_dict(ours.state_dict(), strict=True)
    assert_identical(state(stock), state(ours))
    scramble(stock)
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert_identical(state(ours), state(stock))


@CASES
def test_old_checkpoint_without_a_counter_loads(kind: str, index: int) -> None:
    stock, ours, _ = sampled(kind, index, torch.float32)
    old = stock.state_dict()
    old.pop("num_batches_tracked", None)
    old._metadata[""]["version"] = 1
    ours.load_state_dict(old, strict=True)
    assert_identical(state(ours), state(stock))


@CASES
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_whole_and_separate(kind: str, index: int, copied: Any) -> None:
    _, ours, x = sampled(kind, index, torch.float32)
    before = state(ours)
    twin = copied(ours)
    assert type(twin) is type(ours)
    assert repr(twin) == repr(ours)
    torch.testing.assert_close(twin(x), copy.deepcopy(ours)(x), rtol=0, atol=0)
    assert_identical(state(ours), before)


@CASES
def test_repr(kind: str, index: int) -> None:
    stock, ours, _ = sampled(kind, index, torch.float32)
    assert repr(ours) == repr(stock)


@CASES
def test_factory_arguments(kind: str, index: int) -> None:
    sample = module_samples(kind, torch.float32, True)[index]
    arguments = sample.constructor_input
    for factory in ({"dtype": torch.float64}, {"device": "meta"}, {"device": "meta", "dtype": torch.float64}):
        stock = getattr(nn, kind)(*arguments.args, **arguments.kwargs, **factory)
        ours = getattr(batchnorm, kind)(*arguments.args, **arguments.kwargs, **factory)
        assert [(n, t.dtype, t.device, t.shape) for n, t in ours.state_dict().items()] == [
            (n, t.dtype, t.device, t.shape) for n, t in stock.state_dict().items()
        ]


@pytest.mark.parametrize("kind", KINDS)
@MODES
def test_meta_layer_runs_on_meta_and_materializes(kind: str, training: bool) -> None:
    x = module_samples(kind, torch.float32, True)[0].forward_input.args[0]
    layer = getattr(batchnorm, kind)(x.shape[1], device="meta").train(training)
    y = layer(x.to("meta"))
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert_identical(state(layer), state(getattr(nn, kind)(x.shape[1])))


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_error_inputs(kind: str) -> None:
    for error in module_errors(kind):
        arguments = error.module_error_input.constructor_input
        layer = getattr(batchnorm, kind)(*arguments.args, **arguments.kwargs)
        before = state(layer)
        with pytest.raises(error.error_type, match=error.error_regex):
            layer(*error.module_error_input.forward_input.args)
        assert_identical(state(layer), before)


@CASES
@MODES
def test_double_backward(kind: str, index: int, training: bool) -> None:
    stock, ours, x = sampled(kind, index, torch.float64, training)
    dy, ddx = torch.randn_like(x), torch.randn_like(x)
    found = []
    for layer in (ours, stock):
        inputs = {"x": x.clone().requires_grad_(), "dy": dy.clone().requires_grad_()}
        inputs |= dict(layer.named_parameters())
        first = torch.autograd.grad(
            layer(inputs["x"]), list(inputs.values()), inputs["dy"], create_graph=True, allow_unused=True
        )
        scalar = (first[0] * ddx).sum() + sum(g.square().sum() for g in first[2:])
        second = torch.autograd.grad(scalar, list(inputs.values()), allow_unused=True, materialize_grads=True)
        found.append(dict(zip(inputs, second, strict=True)))
    assert_same(*found, tolerance=(1e-10, 1e-10))


@CASES
@DTYPES
@MODES
def test_forward_mode(kind: str, index: int, dtype: torch.dtype, training: bool) -> None:
    stock, ours, x = sampled(kind, index, dtype, training)
    tangents = {name: torch.randn_like(p) for name, p in ours.named_parameters()} | {"x": torch.randn_like(x)}
    found = []
    for layer in (ours, stock):
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(p, tangents[n]) for n, p in layer.named_parameters()}
            y = torch.func.functional_call(layer, duals, forward_ad.make_dual(x, tangents["x"]))
            primal, tangent = forward_ad.unpack_dual(y)
        found.append({"y": primal.detach(), "tangent": tangent.detach(), **state(layer)})
    assert_same(*found, tolerance=TOLERANCES[dtype])
