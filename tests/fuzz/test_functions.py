"""`functional.batch_norm` and `pure_batch_norm`: the reference's answer or the documented error."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import event
from hypothesis import strategies as st
from torch import Tensor

from batchnorm import functional, kernels, reference
from batchnorm.errors import BatchNormError, InputShapeError, OptionError
from batchnorm.statistics.running import Running
from tests.support.cases import ACTIVATIONS
from tests.support.compare import as_array
from tests.support.oracle import Options, Past

from . import refusals
from .answers import Found, answer_to, assert_answer, bits
from .budget import fuzz, shards
from .calls import Call, Tensors, calls, tensors_of

FORMS = ("in place", "last axis", "pure", "transformed")
EVERY_RANK = (2, 3, 4, 5)


def of_function(call: Call, tensors: Tensors) -> set[type[Exception]]:
    """Return the errors that a function may raise."""
    ranks = (*EVERY_RANK, 1) if call.shape == (0,) else EVERY_RANK  # which passes, as in torch
    found = refusals.of_call(call, tensors, ranks=ranks)
    if call.shape == (0,) and call.channels and (call.affine or call.tracked):
        found.add(InputShapeError)
    if call.activation is not None and call.activation not in ACTIVATIONS:
        found.add(OptionError)
    if not call.tracked and (
        call.policy.needs_running or not call.training or isinstance(call.policy, Running)
    ):
        found.add(OptionError)
    return found


def called(call: Call, tensors: Tensors, form: str, running: list[Tensor | None], dy: Tensor | None) -> Found:
    """Return what one of the four forms gives; the gradients too, where there is a cotangent."""
    residual = tensors.residual
    options = {
        "training": call.training,
        "momentum": torch.tensor(call.momentum) if call.is_momentum_a_tensor else call.momentum,
        "eps": call.eps,
        "activation": call.activation,
        "mask": tensors.mask,
        "statistics": call.policy,
    }
    leaves = {"x": tensors.x, "weight": tensors.weight, "bias": tensors.bias, "residual": residual}
    leaves = {n: t.detach() for n, t in leaves.items() if t is not None}

    def pure(leaves: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        named = dict(leaves)
        y, *after = functional.pure_batch_norm(named.pop("x"), *running, **named, **options)
        return y, tuple(t for t in after if t is not None)

    def in_place(leaves: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        named = dict(leaves)
        x = named.pop("x")
        if form == "last axis":
            named |= {n: t.movedim(1, -1) for n, t in named.items() if n == "residual"}
            return functional.batch_norm(x.movedim(1, -1), *running, **named, **options, axis=-1).movedim(
                -1, 1
            ), ()
        return functional.batch_norm(x, *running, **named, **options), ()

    if form == "transformed" and dy is None:
        y, after = pure(leaves)
        gradients: dict[str, Tensor | None] = {}
    elif form == "transformed":
        y, vjp, after = torch.func.vjp(pure, leaves, has_aux=True)
        (gradients,) = vjp(dy)
    else:
        wanted = {n: t.requires_grad_(t.is_floating_point()) for n, t in leaves.items()}
        y, after = (pure if form == "pure" else in_place)(wanted)
        if dy is not None:
            y.backward(dy)
        gradients = {n: t.grad for n, t in wanted.items()}
    if form in ("in place", "last axis"):
        after = tuple(t for t in running if t is not None)
    return Found(
        y.detach(), *map(gradients.get, ("x", "weight", "bias", "residual")), *(after or (None, None))
    )


def check(call: Call, form: str) -> None:
    """Raise unless the call is answered or refused as it must be; only the in-place forms write."""
    momentum = 0.1 if call.momentum is None else call.momentum
    call = dataclasses.replace(
        call, small_batch="raise", nonfinite="propagate", lengths="none", momentum=momentum
    )
    tensors = tensors_of(call)
    if form == "last axis" and len(call.shape) < 2:
        form = "in place"
    running: list[Tensor | None] = (
        [tensors.running_mean, tensors.running_var] if call.tracked else [None, None]
    )
    past = Past(None, None)
    if call.tracked:
        past = Past(reference.Running(*(as_array(t).copy() for t in running)), None)
    before = {f.name: bits(getattr(tensors, f.name)) for f in dataclasses.fields(tensors)}
    errors = of_function(call, tensors)
    event("refused" if errors else "answered")
    with kernels.use(call.engine):
        if errors:
            with pytest.raises(BatchNormError) as caught:
                called(call, tensors, form, running, None)
            assert caught.type in errors, f"{caught.value!r}, expected one of {errors}"
        elif call.shape == (0,):
            assert called(call, tensors, form, running, tensors.dy).y.shape == (0,)
        else:
            options = Options(call.policy, call.training, call.eps, call.momentum_used, call.activation)
            answer = answer_to(call, tensors, options, past)
            assert_answer(called(call, tensors, form, running, answer.dy), answer)
    may_change = () if errors or form in ("pure", "transformed") else ("running_mean", "running_var")
    after = {f.name: bits(getattr(tensors, f.name)) for f in dataclasses.fields(tensors)}
    for name, value in after.items():
        assert name in may_change or value == before[name], f"{name} has changed"


@shards
def test_any_call_of_a_function(shard: int) -> None:
    fuzz(check, shard, 0.25, 150, call=calls(), form=st.sampled_from(FORMS))
