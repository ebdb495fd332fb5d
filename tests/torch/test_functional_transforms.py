"""Row 30: `torch.func` transforms go through the functions and the layers, with the right derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn import functional as stock

import batchnorm
from batchnorm import functional
from batchnorm.errors import OptionError
from tests.torch.twins import assert_identical, assert_same, scramble, state

ROW_30 = {"rtol": 1e-11, "atol": 1e-11}
SMOOTH = ["silu", "gelu", "sigmoid", "tanh", None]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def tensors(shape: tuple[int, ...] = (6, 3)) -> tuple[Tensor, ...]:
    """Return x, running mean, running variance, weight and bias."""
    channels = shape[1]
    return random(*shape) + 2, random(channels), random(channels).exp(), random(channels), random(channels)


def losses(training: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return (ours, stock): (x, mean, var, weight, bias) -> a scalar that weighs every output differently."""

    def ours(x: Tensor, *rest: Tensor) -> Tensor:
        y, _, _ = functional.pure_batch_norm(x, *rest, training=training)
        return (y.sin() * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum()

    def theirs(x: Tensor, mean: Tensor, var: Tensor, *affine: Tensor) -> Tensor:
        y = stock.batch_norm(x, *(None, None) if training else (mean, var), *affine, training=training)
        return (y.sin() * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum()

    return ours, theirs


MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@MODES
def test_row_30_grad_is_autograd_s(training: bool) -> None:
    """Row 30: `grad` over input and parameters at once."""
    arguments = tensors()
    ours, theirs = losses(training)
    found = grad(ours, argnums=(0, 3, 4))(*arguments)
    leaves = [t.clone().requires_grad_(i in (0, 3, 4)) for i, t in enumerate(arguments)]
    expected = torch.autograd.grad(theirs(*leaves), [leaves[i] for i in (0, 3, 4)])
    torch.testing.assert_close(found, expected, **ROW_30)


@MODES
@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
@pytest.mark.parametrize("place", [0, 3, 4], ids=["x", "weight", "bias"])
def test_row_30_jacobians_and_hessian(place: int, transform: Callable[..., Any], training: bool) -> None:
    """Row 30: reverse, forward, and forward over reverse."""
    arguments = tensors((4, 2))
    ours, theirs = losses(training)
    torch.testing.assert_close(
        transform(ours, argnums=place)(*arguments), transform(theirs, argnums=place)(*arguments), **ROW_30
    )


@MODES
def test_row_30_jvp_and_vjp(training: bool) -> None:
    """Row 30: tangents of input, weight and bias together."""
    x, mean, var, weight, bias = tensors((4, 3, 5))
    tangents = (random(4, 3, 5), random(3), random(3))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.pure_batch_norm(x, mean, var, weight, bias, training=training)[0]

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        running = (None, None) if training else (mean, var)
        return stock.batch_norm(x, *running, weight, bias, training=training)

    found, expected = (jvp(f, (x, weight, bias), tangents) for f in (ours, theirs))
    torch.testing.assert_close(found, expected, **ROW_30)
    found, expected = (vjp(f, x, weight, bias)[1](tangents[0]) for f in (ours, theirs))
    torch.testing.assert_close(found, expected, **ROW_30)


@MODES
def test_row_30_vmap_is_a_loop(training: bool) -> None:
    """Row 30: over input and statistics; the moved statistics come back per example."""
    x, mean, var = random(7, 6, 3), random(7, 3), random(7, 3).exp()

    def call(*arguments: Tensor) -> tuple[Tensor | None, ...]:
        return functional.pure_batch_norm(*arguments, training=training, momentum=0.3)

    found = vmap(call)(x, mean, var)
    loop = [call(*arguments) for arguments in zip(x, mean, var, strict=True)]
    expected = tuple(torch.stack(parts) for parts in zip(*loop, strict=True))
    torch.testing.assert_close(found, expected, **ROW_30)
    shared = vmap(call, in_dims=(0, None, None))(x, mean[0], var[0])
    torch.testing.assert_close(shared[0][0], found[0][0], **ROW_30)


def test_row_30_per_example_gradients() -> None:
    """Row 30: vmap over grad, in evaluation, where examples do not touch each other."""
    x, *rest = tensors((5, 3, 4))
    ours, _ = losses(training=False)
    found = vmap(grad(ours), in_dims=(0, None, None, None, None))(x.unsqueeze(1), *rest)
    expected = torch.stack([grad(ours)(example.unsqueeze(0), *rest) for example in x])
    torch.testing.assert_close(found, expected, **ROW_30)


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {}], ids=["untracked", "tracked"])
@MODES
def test_row_30_ensembles(options: dict[str, Any], training: bool) -> None:
    """Row 30: `stack_module_state` and vmap; tracked statistics move where they are arguments."""
    models = [
        nn.Sequential(nn.Linear(3, 3), scramble(batchnorm.BatchNorm1d(3, activation="silu", **options)))
        .double()
        .train(training)
        for _ in range(4)
    ]
    x = random(6, 3)
    parameters, buffers = stack_module_state(models)
    y = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(y, torch.stack([model(x) for model in models]), **ROW_30)
    moved = {name: torch.stack([model.state_dict()[name] for model in models]) for name in buffers}
    torch.testing.assert_close(buffers, moved, **ROW_30)


@MODES
def test_row_30_functional_call_under_grad(training: bool) -> None:
    """Row 30: buffers handed in as arguments, and parameters differentiated."""
    model = nn.Sequential(nn.Linear(3, 4), scramble(batchnorm.BatchNorm1d(4))).double().train(training)
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    before, x, dy = state(model), random(6, 3), random(6, 4)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        buffers = {name: tensor.clone() for name, tensor in buffers.items()}
        return (functional_call(model, (parameters, buffers), (x,)) * dy).sum()

    found = grad(loss)(dict(model.named_parameters()), buffers)
    assert_identical(state(model), before)
    (model(x) * dy).sum().backward()
    assert_same(found, {name: p.grad for name, p in model.named_parameters()}, tolerance=(1e-11, 1e-11))


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "vmap": lambda model, x: vmap(model)(x),
    "grad": lambda model, x: grad(lambda x: model(x).square().sum())(x[0]),
    "grad-of-parameters": lambda model, x: grad(lambda p: functional_call(model, p, (x[0],)).sum())(
        dict(model.named_parameters())
    ),
    "jvp": lambda model, x: jvp(model, (x[0],), (x[1],)),
    "jacrev": lambda model, x: jacrev(model)(x[0]),
    "vmap-of-grad": lambda model, x: vmap(grad(lambda x: model(x).square().sum()))(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_row_30_captured_statistics_raise_and_stay(momentum: float | None, name: str) -> None:
    """Row 30: statistics that the transform does not know cannot move; the error says what can be done."""
    model = scramble(batchnorm.BatchNorm1d(3, momentum=momentum)).double()
    before = state(model)
    with pytest.raises(
        OptionError, match=r"BatchNorm1d: torch\.func cannot write.*pure_batch_norm.*track_run"
    ):
        TRANSFORMS[name](model, random(4, 6, 3))
    assert_identical(state(model), before)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("options", [{"track_running_stats": False}, {}], ids=["untracked", "eval"])
def test_row_30_layers_without_captured_writes(options: dict[str, Any], name: str) -> None:
    """Row 30: the same transforms give stock's results where no statistics move."""
    theirs = scramble(nn.BatchNorm1d(3, **options)).double()
    ours = batchnorm.BatchNorm1d(3, **options).double()
    ours.load_state_dict(theirs.state_dict())
    x = random(4, 6, 3)
    for layer in (ours, theirs):
        layer.train(bool(options))
    found, expected = (TRANSFORMS[name](layer, x) for layer in (ours, theirs))
    torch.testing.assert_close(found, expected, **ROW_30)


def test_row_30_one_statistic_captured_of_two_moves_neither() -> None:
    """Row 30: an error at the second statistic has not moved the first."""
    x, mean, var = random(4, 6, 3), random(4, 3), random(3).exp()
    before = mean.clone(), var.clone()
    with pytest.raises(OptionError, match=r"torch\.func cannot write"):
        vmap(lambda x, mean: functional.batch_norm(x, mean, var, training=True))(x, mean)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@pytest.mark.parametrize("activation", SMOOTH)
@MODES
def test_gradcheck_and_gradgradcheck(training: bool, activation: str | None) -> None:
    """First and second derivatives against finite differences, in every mode, residual included."""
    _, mean, var, *_ = tensors((4, 2, 2))
    inputs = tuple(t.requires_grad_() for t in (random(4, 2, 2), random(2), random(2), random(4, 2, 2)))

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        running = (mean.clone(), var.clone())
        options = {"training": training, "residual": residual, "activation": activation}
        return functional.batch_norm(x, *running, weight, bias, **options)

    assert gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)


@MODES
def test_a_tangent_of_the_cotangent_is_not_lost(training: bool) -> None:
    """Forward mode opened between the forward and the backward: the gradients are linear in dy."""
    layer = scramble(batchnorm.BatchNorm1d(3)).double().train(training)
    x, dy, tangent = random(6, 3).requires_grad_(), random(6, 3), random(6, 3)
    y = layer(x)
    (expected,) = torch.autograd.grad(y, x, tangent, retain_graph=True)
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, tangent))
        found = forward_ad.unpack_dual(dx).tangent
    torch.testing.assert_close(found, expected, **ROW_30)


@MODES
@pytest.mark.parametrize("activation", ["silu", None])
def test_vectorized_backward_is_a_loop_of_backwards(activation: str | None, training: bool) -> None:
    """`is_grads_batched`, which vectorizes over the backward of an ordinary forward."""
    layer = scramble(batchnorm.BatchNorm1d(3, activation=activation)).double().train(training)
    x, dys = random(6, 3).requires_grad_(), random(5, 6, 3)
    leaves = [x, *layer.parameters()]
    y = layer(x)
    found = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    loop = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*loop, strict=True))), **ROW_30)


def test_the_tangent_of_one_value_per_channel_is_that_of_the_running_statistics() -> None:
    torch.manual_seed(0)
    layer = batchnorm.BatchNorm1d(3, small_batch="running")
    layer(torch.randn(8, 3) * 2 + 1)
    x, tangent = torch.randn(2, 1, 3)
    rstd = 1 / torch.sqrt(layer.running_var + layer.eps)
    expected = (x - layer.running_mean) * rstd
    with forward_ad.dual_level():
        y, found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, tangent * rstd)
