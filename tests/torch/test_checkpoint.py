"""Activation checkpointing: what is computed again is what was computed, and statistics move once."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import RecomputeError
from batchnorm.torch.contexts.checkpointing import KEPT, Memory
from tests.torch.checkpointed import (
    POLICIES,
    RENORM,
    WAYS,
    Way,
    assert_bits,
    batches,
    each_way,
    every_way,
    made,
    plainly,
    trained,
)
from tests.torch.twins import assert_identical, scramble


@pytest.mark.one_in(3)
@every_way
@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("with_mask", [False, True], ids=["plain", "masked"])
def test_row_8_checkpointing_changes_no_bit(options: dict[str, Any], with_mask: bool, way: Way) -> None:
    """Row 8: outputs, gradients, statistics, counts and `skipped`, three forwards before a backward."""
    inputs = batches()
    if options.get("nonfinite") == "skip":
        inputs[1][2, 1] = torch.inf
    masks = None
    if with_mask:
        masks = [torch.rand(7, 5, 4) > 0.3 for _ in inputs]
        masks[2][5:] = False  # a ghost batch without a value
        if "small_batch" in options:
            masks[1][:] = False
            masks[1][0, 0, 0] = True  # one value in all
    expected = trained(made(options), plainly, inputs, masks)
    assert_bits(trained(made(options), way, inputs, masks), expected)


@each_way
def test_row_8_without_its_memory_renorm_has_another_gradient(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 8: what these tests are there for can be seen."""
    options = {"statistics": RENORM}
    expected = trained(made(options), plainly, batches())
    monkeypatch.setattr(Memory, "known", lambda _self, known, *_: known)
    found = trained(made(options), way, batches())
    assert torch.equal(found["y0 of step 0"], expected["y0 of step 0"])
    assert not torch.equal(found["dx0 of step 0"], expected["dx0 of step 0"])


@each_way
def test_row_19_one_value_per_channel_is_computed_again_by_what_it_was_normalized_by(way: Way) -> None:
    """Rows 8 and 19: a batch of one goes by the running statistics, which then move, before its backward."""

    def make() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(4, 4), scramble(batchnorm.BatchNorm1d(4, small_batch="running", activation="tanh"))
        )

    torch.manual_seed(4)
    inputs = [torch.randn(n, 4) * 3 for n in (1, 6, 1, 5)]
    assert_bits(trained(make(), way, inputs), trained(make(), plainly, inputs))


@each_way
def test_in_evaluation_adapted_is_computed_again(way: Way) -> None:
    options = {"statistics": batchnorm.Adapted(4)}
    expected = trained(made(options).eval(), plainly, batches())
    assert_bits(trained(made(options).eval(), way, batches()), expected)


def test_second_derivatives_of_what_is_computed_again() -> None:
    """The first pass's r and d stand in the second derivative too."""
    found = []
    for way in (plainly, WAYS["not"]):
        torch.manual_seed(6)
        layer = scramble(batchnorm.BatchNorm2d(4, statistics=RENORM, dtype=torch.float64))
        layer.num_batches_tracked.fill_(9)
        leaves = [x.double().requires_grad_() for x in batches()]
        outputs = [way(layer, leaf) for leaf in leaves]
        loss = sum((y.tanh() * torch.randn_like(y)).sum() for y in outputs)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        sum((g.square() * torch.randn_like(g)).sum() for g in gradients).backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_two_backwards_of_one_graph() -> None:
    """A pass may come again any number of times."""
    layer = scramble(batchnorm.BatchNorm2d(4, statistics=RENORM))
    x, other = batches(2)
    leaf = x.requires_grad_()
    y = WAYS["not"](layer, leaf)
    layer(other)
    (first,) = torch.autograd.grad(y.square().sum(), leaf, retain_graph=True)
    layer(other)
    (second,) = torch.autograd.grad(y.square().sum(), leaf)
    assert torch.equal(first, second)
    assert layer.num_batches_tracked == 3 + 3


def test_lean_within_a_checkpoint() -> None:
    def leanly(net: nn.Module, *a: Any) -> Tensor:
        with batchnorm.lean():
            return net(*a)

    options = {"statistics": RENORM}
    expected = trained(made(options), plainly, batches())
    for way in (WAYS["reentrant"], WAYS["not"]):
        assert_bits(
            trained(made(options), lambda net, *a, way=way: way(leanly, net, *a), batches()), expected
        )


def test_a_memory_is_there_where_it_is_needed_only_and_is_bounded() -> None:
    for options in POLICIES.values():
        net = made(options)
        trained(net, plainly, batches())
        assert net.first._memory is None  # no checkpointing
        trained(net, WAYS["not"], batches())
        needs = "small_batch" in options or "enorm" in str(options) or "Adapted" in str(options)
        assert (net.first._memory is not None) == needs
    layer = scramble(batchnorm.BatchNorm2d(4, statistics=RENORM))
    for _ in range(KEPT + 5):
        with torch.no_grad():
            layer(torch.randn(3, 4, 2, 2))
    assert len(layer._memory._passes) == KEPT


def test_copies_and_files_have_no_memory() -> None:
    layer = scramble(batchnorm.BatchNorm2d(4, statistics=RENORM))
    with torch.no_grad():
        layer(batches()[0])
    assert layer._memory is not None
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        copy.copy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert other._memory is None
        assert other.statistics == RENORM
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(4).state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU, for which the host would wait")
@each_way
def test_the_host_waits_for_nothing(way: Way) -> None:
    """A recompute of Renorm finds its pass on the device."""
    layer = scramble(batchnorm.BatchNorm2d(4, statistics=RENORM)).cuda()
    leaves = [x.cuda().requires_grad_() for x in batches()]
    for _ in range(2):  # the first round compiles
        outputs = [way(layer, leaf) for leaf in leaves]
        loss = sum(y.square().sum() for y in outputs)
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@every_way
def test_one_backward_through_several_passes(way: Way) -> None:
    """The latest pass comes again first."""
    found = []
    for one in (plainly, way):
        net, leaves = made({"statistics": RENORM}), [x.requires_grad_() for x in batches()]
        outputs = [one(net, leaf) for leaf in leaves]
        torch.manual_seed(5)
        torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
        found.append({f"dx{k}": leaf.grad for k, leaf in enumerate(leaves)})
    assert_identical(found[1], found[0])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["batch", "ghost", "renorm", "lenient"])
def test_compiled_with_what_is_checkpointed(name: str) -> None:
    """The compiler itself computes again: rightly, or not at all."""
    torch.compiler.reset()
    found = []
    mask = torch.ones(7, 5, 4, dtype=torch.bool) if name == "lenient" else None
    for compiles in (False, True):
        net = made(POLICIES[name])
        run: Any = lambda x, net=net: WAYS["not"](net, x, mask)  # noqa: E731
        if compiles:
            run = torch.compile(run, backend="aot_eager", fullgraph=True)
        leaf = batches(1)[0].requires_grad_()
        y = run(leaf)
        torch.manual_seed(5)
        if compiles and name in ("renorm", "lenient"):
            with pytest.raises(RecomputeError, match="leave this layer out of checkpointing"):
                y.backward(torch.randn_like(y))
            continue
        y.backward(torch.randn_like(y))
        found.append({"dx": leaf.grad, **{n: b.double() for n, b in net.named_buffers()}})
    for n, theirs in found[0].items() if len(found) > 1 else ():
        torch.testing.assert_close(found[1][n], theirs, rtol=4e-6, atol=4e-6, msg=n)
    torch.compiler.reset()
