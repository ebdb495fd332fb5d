"""The layers against the mathematics, on the one grid of cases: output, gradients, running statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import batchnorm
from batchnorm import functional, reference
from batchnorm.statistics.policy import Policy
from tests.support.cases import CASES, KINKS, Case, Inputs
from tests.support.compare import as_array, assert_close, reference_results
from tests.torch.twins import assert_identical, state

# Masks and groups are arguments of the kernels, tested there; a layer takes the whole batch.
WHOLE_BATCH = [case for case in CASES if not (case.masked or case.all_masked or case.group_size)]
GRID = pytest.mark.parametrize("case", WHOLE_BATCH, ids=str)


def layer_for(case: Case, inputs: Inputs, momentum: float | None = 0.3) -> torch.nn.Module:
    """Return the layer with the case's parameters and running statistics of some past."""
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(case.shape)]
    layer = getattr(batchnorm, kind)(
        case.shape[1],
        momentum=momentum,
        affine=case.affine,
        dtype=case.parameter_dtype or case.dtype,
        activation=case.activation,
    )
    with torch.no_grad():
        if case.affine:
            layer.weight.copy_(inputs.weight)
            layer.bias.copy_(inputs.bias)
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
    return layer


def backward(layer: torch.nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, dx and dresidual; the parameters' gradients lie on the layer."""
    x = inputs.x.detach().requires_grad_()
    residual = None if inputs.residual is None else inputs.residual.detach().requires_grad_()
    y = layer(x, residual)
    y.backward(inputs.dy)
    return y.detach(), x.grad, None if residual is None else residual.grad


def assert_gradients(
    layer: torch.nn.Module, case: Case, expected: object, dx: Tensor, dresidual: Tensor | None
) -> None:
    assert_close(dx, expected.dx, dtype=case.dtype, scale=expected.std, what="dx")
    if case.residual:
        assert_close(dresidual, expected.dresidual, dtype=case.dtype, what="dresidual")
    if case.affine:
        dtype = case.parameter_dtype or case.dtype
        assert_close(layer.weight.grad, expected.dweight, dtype=dtype, what="dweight")
        assert_close(layer.bias.grad, expected.dbias, dtype=dtype, what="dbias")


@GRID
def test_training(case: Case) -> None:
    inputs = case.make()
    layer = layer_for(case, inputs)
    before = reference.Running(as_array(layer.running_mean).copy(), as_array(layer.running_var).copy())
    y, dx, dresidual = backward(layer, inputs)
    expected = reference_results(case, inputs)
    assert y.dtype is case.dtype
    assert_close(y, expected.y, dtype=case.dtype, what="y")
    assert_gradients(layer, case, expected, dx, dresidual)
    moved = reference.update_running_torch(
        before, expected.mean[0], expected.var[0], float(expected.count[0]), momentum=0.3
    )
    wide = torch.promote_types(case.dtype, torch.float32)
    assert layer.running_mean.dtype is wide
    assert_close(layer.running_mean, moved.mean, dtype=wide, what="running_mean")
    assert_close(layer.running_var, moved.var, dtype=wide, what="running_var")
    assert layer.num_batches_tracked == 1


@GRID
def test_average_over_batches(case: Case) -> None:
    inputs = case.make()
    layer = layer_for(case, inputs, momentum=None)
    running = reference.Running(as_array(layer.running_mean).copy(), as_array(layer.running_var).copy())
    for batches in (1, 2):
        inputs = case.make(seed=batches)
        layer(inputs.x, inputs.residual)
        now = reference_results(case, inputs)
        running = reference.update_running_torch(
            running, now.mean[0], now.var[0], float(now.count[0]), momentum=None, batches=batches
        )
    wide = torch.promote_types(case.dtype, torch.float32)
    assert_close(layer.running_mean, running.mean, dtype=wide, what="running_mean")
    assert_close(layer.running_var, running.var, dtype=wide, what="running_var")


@pytest.mark.parametrize("policy", [batchnorm.Batch(), batchnorm.Running()], ids=str)
@GRID
def test_given_statistics(case: Case, policy: Policy) -> None:
    """In evaluation, and in training where the layer is frozen: by the running ones, which do not move.

    An activation without kinks, as the case keeps z off those by the batch's statistics.
    """
    inputs = case.make()
    layer = layer_for(case, inputs).train(policy == batchnorm.Running())
    layer.statistics = policy
    if case.activation in ("relu", "relu6", "leaky_relu", "hardswish"):
        layer.activation = "tanh"
        case = Case(**{**case.__dict__, "activation": "tanh"})
    if math.prod(case.shape):
        count, mean, m2 = functional.moments(inputs.x)
        layer.running_mean.copy_(mean + 0.1 * (m2 / count).sqrt())
        layer.running_var.copy_(1.3 * m2 / count)
    before = state(layer)
    y, dx, dresidual = backward(layer, inputs)
    expected = reference_results(case, inputs, mean=layer.running_mean, var=layer.running_var)
    assert y.dtype is case.dtype
    assert_close(y, expected.y, dtype=case.dtype, what="y")
    assert_gradients(layer, case, expected, dx, dresidual)
    assert_identical(state(layer), before)


@pytest.mark.parametrize("activation", KINKS)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
def test_frozen_in_training_with_activations_that_have_kinks(activation: str, residual: bool) -> None:
    """Given the batch's own mean and var, z is off the kinks; the gradients are others than a batch's."""
    case = Case(f"frozen {activation} {residual}", (6, 5, 4, 3), residual=residual, activation=activation)
    inputs = case.make()
    layer = layer_for(case, inputs)
    count, mean, m2 = functional.moments(inputs.x)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(m2 / count)
    layer.statistics = batchnorm.Running()
    y, dx, dresidual = backward(layer, inputs)
    expected = reference_results(case, inputs, mean=layer.running_mean, var=layer.running_var)
    assert_close(y, expected.y, dtype=case.dtype, what="y")
    assert_gradients(layer, case, expected, dx, dresidual)


def test_moments_of_a_masked_batch() -> None:
    for case in (case for case in CASES if case.masked and case.group_size is None):
        inputs = case.make()
        count, mean, m2 = functional.moments(inputs.x, inputs.mask)
        expected = reference_results(case, inputs)
        assert count.item() == expected.count[0]
        in_std = np.sqrt(1 / (expected.var[0] + 1))
        assert_close(mean, expected.mean[0], dtype=torch.float32, scale=in_std, what="mean")
        assert_close(m2 / count, expected.var[0], dtype=torch.float32, what="var")
