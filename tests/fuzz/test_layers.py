"""Layers: the reference's answer, or the documented error, and an error has changed nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import event
from torch import Tensor, nn

from batchnorm import kernels, reference
from batchnorm.errors import BatchNormError
from tests.support.compare import as_array
from tests.support.oracle import Past

from . import refusals
from .answers import Found, answer_to, assert_answer, bits, options_of
from .budget import fuzz, shards
from .calls import KINDS, Call, Tensors, calls, tensors_of


def layer_of(call: Call, tensors: Tensors) -> nn.Module:
    """Return the layer of a call, with a past."""
    layer = KINDS[call.kind](
        call.channels,
        call.eps,
        call.momentum,
        call.affine,
        call.tracked,
        dtype=call.parameter_dtype,
        bias=call.bias,
        statistics=call.policy,
        activation=call.activation,
        nonfinite=call.nonfinite,
        small_batch=call.small_batch,
    ).train(call.training)
    if call.is_momentum_a_tensor and call.momentum is not None:
        layer.momentum = torch.tensor(call.momentum)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(layer, name) is not None:
                getattr(layer, name).copy_(getattr(tensors, name))
        if call.tracked:
            layer.num_batches_tracked.fill_(call.past)
    return layer


def snapshot(layer: nn.Module) -> dict[str, object]:
    """Return all that a failed call must leave as it is: parameters and buffers, options, mode."""
    tensors = {**layer._parameters, **layer._buffers}
    options = {n: v for n, v in vars(layer).items() if not n.startswith("_")}
    return {n: (id(t), bits(t)) for n, t in tensors.items()} | options


def called(layer: nn.Module, tensors: Tensors, dy: Tensor) -> Found:
    """Return what a forward and a backward give."""
    x = tensors.x.detach().requires_grad_()
    residual = None if tensors.residual is None else tensors.residual.detach().requires_grad_()
    y = layer(x, residual, tensors.mask, tensors.lengths)
    y.backward(dy)
    gradients = (None if t is None else t.grad for t in (x, layer.weight, layer.bias, residual))
    return Found(y.detach(), *gradients, layer.running_mean, layer.running_var)


def past_of(layer: nn.Module) -> Past:
    if layer.running_mean is None:
        return Past(None, None)
    running = reference.Running(as_array(layer.running_mean).copy(), as_array(layer.running_var).copy())
    return Past(running, int(layer.num_batches_tracked))


def assert_refused(layer: nn.Module, tensors: Tensors, errors: set[type[Exception]]) -> None:
    """Raise unless the call raises one of these errors, with the layer's name, and changes nothing."""
    before = snapshot(layer)
    with pytest.raises(BatchNormError) as caught:
        layer(tensors.x, tensors.residual, tensors.mask, tensors.lengths)
    assert caught.type in errors, f"{caught.value!r}, expected one of {errors}"
    assert str(caught.value).startswith(type(layer).__name__), str(caught.value)
    assert snapshot(layer) == before


def check(call: Call) -> None:
    """Raise unless the call is answered or refused as it must be."""
    tensors = tensors_of(call)
    errors = refusals.of_constructor(call)
    if errors:
        event("refused by the constructor")
        with pytest.raises(tuple(errors)):
            layer_of(call, tensors)
        return
    layer = layer_of(call, tensors)
    with kernels.use(call.engine):
        errors = refusals.of_call(call, tensors)
        event("refused" if errors else "answered")
        if errors:
            assert_refused(layer, tensors, errors)
            return
        past = past_of(layer)
        answer = answer_to(call, tensors, options_of(call), past)
        found = called(layer, tensors, answer.dy)
    assert_answer(found, answer)
    if call.tracked:
        assert layer.num_batches_tracked == call.past + answer.expected.batches
    if call.nonfinite == "skip":
        assert layer.skipped == answer.expected.skipped


@shards
def test_any_call_of_a_layer(shard: int) -> None:
    fuzz(check, shard, 0.6, 250, call=calls())
