"""Layers in states that no constructor makes: an answer, or an error that names the layer, and no change."""

from __future__ import annotations

import dataclasses

from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from batchnorm import kernels, reference
from tests.support.compare import as_array
from tests.support.oracle import Past

from . import refusals
from .answers import Answer, Found, answer_to, assert_answer, bits, options_of
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
    """Return whether nothing but the corruption is wrong with a call."""
    return not refusals.of_constructor(call) and not refusals.of_call(call, tensors)


def check_answered(call: Call, name: str) -> None:
    """Raise unless a state that has a meaning is answered by the reference's answer for it."""
    tensors = tensors_of(call)
    assume(is_whole(call, tensors))
    layer = layer_of(call, tensors)
    ANSWERED[name](layer)
    answer = state_answer(call, tensors, layer)
    with kernels.use(call.engine):
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


# States that have no meaning for some calls; for the others the answer is that of the reference.
READ = ("eps nan", " inf", " in one place")
# The effect on statistics of a policy for bad batches that does not exist is not promised.
STATISTICS = {"running_mean", "running_var", "num_batches_tracked", "skipped"}


def state_answer(call: Call, tensors: Tensors, layer: nn.Module) -> Answer:
    """Return the reference's answer for a layer's state as it is."""
    parameters = {n: None if (p := getattr(layer, n)) is None else p.detach() for n in ("weight", "bias")}
    options = dataclasses.replace(options_of(call), eps=layer.eps)
    return answer_to(call, dataclasses.replace(tensors, **parameters), options, past_of(layer))


def assert_unread(call: Call, tensors: Tensors, layer: nn.Module, y: Tensor, changed: set[str]) -> None:
    """Raise unless a call has answered, and moved, what that of a layer without the corruption does."""
    twin = layer_of(call, tensors)
    expected = twin(tensors.x, tensors.residual, tensors.mask, tensors.lengths)
    assert bits(y) == bits(expected), "an answer, and not that of the layer without the corruption"
    for of_layer, of_twin in ((layer._buffers, twin._buffers), (layer._parameters, twin._parameters)):
        for name in of_layer.keys() - changed:
            assert bits(of_layer[name]) == bits(of_twin[name]), f"{name} has another value"


def check_refused(call: Call, name: str) -> None:
    """Raise unless a call with a state that has none changes nothing, and says which layer it is.

    A call that does not read what is corrupted is answered as if it were not.
    """
    tensors = tensors_of(call)
    assume(is_whole(call, tensors))
    layer = layer_of(call, tensors)
    made = {**layer._buffers, **layer._parameters}
    REFUSED[name](layer)
    changed = {n for n, t in {**layer._buffers, **layer._parameters}.items() if t is not made[n]}
    before = snapshot(layer)
    answer = state_answer(call, tensors, layer) if name.endswith(READ) else None
    with kernels.use(call.engine):
        try:
            y = layer(tensors.x, tensors.residual, tensors.mask, tensors.lengths)
        except Exception as raised:
            error = raised
        else:
            if answer is not None:
                assert_answer(Found(y.detach(), *[None] * 6), answer)
            else:
                left = changed | (STATISTICS if name == "nonfinite unknown" else set())
                assert_unread(call, tensors, layer, y, left)
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
