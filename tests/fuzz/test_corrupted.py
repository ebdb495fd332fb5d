"""Layers in states that no constructor makes: an answer, or an error that names the layer, and no change."""

from __future__ import annotations

import dataclasses

from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

from batchnorm import kernels, reference
from tests.support.compare import as_array
from tests.support.oracle import Past

from . import refusals
from .answers import answer_to, assert_answer, options_of
from .budget import fuzz, shards
from .calls import Call, Tensors, calls, tensors_of
from .corruptions import ANSWERED, REFUSED
from .test_layers import called, layer_of, snapshot


def past_of(layer: nn.Module) -> Past:
    """Return the state as it is, corrupted or not."""
    if layer.running_mean is None:
        return Past(None, None)
    running = (as_array(t).reshape(-1).copy() for t in (layer.running_mean, layer.running_var))
    batches = layer.num_batches_tracked
    return Past(reference.Running(*running), None if batches is None else int(batches))


def is_whole(call: Call, tensors: Tensors) -> bool:
    """Whether nothing but the corruption is wrong with a call."""
    return not refusals.of_constructor(call) and not refusals.of_call(call, tensors)


def check_answered(call: Call, name: str) -> None:
    """Raise unless a state that has a meaning is answered by the reference's answer for it."""
    tensors = tensors_of(call)
    assume(is_whole(call, tensors))
    layer = layer_of(call, tensors)
    ANSWERED[name](layer)
    parameters = {n: None if (p := getattr(layer, n)) is None else p.detach() for n in ("weight", "bias")}
    tensors = dataclasses.replace(tensors, **parameters)
    with kernels.use(call.engine):
        answer = answer_to(call, tensors, options_of(call), past_of(layer))
        found = called(layer, tensors, answer.dy)
    column = {
        n: None if (t := getattr(found, n)) is None else t.reshape(-1)
        for n in ("running_mean", "running_var")
    }
    found = found._replace(**column)
    if name.endswith("nan"):  # of the parameters' gradients nothing is left, not even where all is masked
        found = found._replace(dweight=None, dbias=None)
    assert_answer(found, answer)
    if call.tracked and layer.num_batches_tracked is not None:
        before = -7 if name == "num_batches negative" else call.past
        assert layer.num_batches_tracked == before + answer.expected.batches


def check_refused(call: Call, name: str) -> None:
    """Raise unless a call with a state that has none changes nothing, and says which layer it is."""
    tensors = tensors_of(call)
    assume(is_whole(call, tensors))
    layer = layer_of(call, tensors)
    REFUSED[name](layer)
    before = snapshot(layer)
    with kernels.use(call.engine):
        try:
            y = layer(tensors.x, tensors.residual, tensors.mask, tensors.lengths)
        except Exception as raised:
            error = raised
        else:
            assert y.shape == tensors.x.shape
            return
    told = f"{error}" + "".join(getattr(error, "__notes__", ()))
    assert type(layer).__name__ in told, f"{error!r} names no layer"
    assert snapshot(layer) == before, "an error has changed something"


@shards
def test_states_that_have_a_meaning(shard: int) -> None:
    fuzz(check_answered, shard, 0.08, 100, call=calls(), name=st.sampled_from(sorted(ANSWERED)))


@shards
def test_states_that_have_none(shard: int) -> None:
    fuzz(check_refused, shard, 0.07, 100, call=calls(), name=st.sampled_from(sorted(REFUSED)))
