"""Activation checkpointing within `batchnorm.mask` and `batchnorm.domain`: the first pass's hold."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import RecomputeError
from tests.torch.checkpointed import (
    POLICIES,
    RENORM,
    Way,
    assert_bits,
    batches,
    differentiated,
    each_way,
    every_way,
    made,
    plainly,
)
from tests.torch.twins import assert_identical, scramble


@pytest.mark.one_in(3)
@every_way
@pytest.mark.parametrize("name", ["batch", "renorm", "running", "lenient", "ghost"])
@pytest.mark.parametrize("around", ["outside", "within the last"])
def test_row_8_a_recompute_has_the_mask_of_its_first_pass(name: str, way: Way, around: str) -> None:
    """Rows 2 and 8: the backward is outside of the masks' blocks, or within another mask's."""
    options, inputs = POLICIES[name], batches()
    masks: list[Tensor | None] = [torch.rand(7, 5, 4) > 0.3, None, torch.rand(7, 5, 4) > 0.6]

    def through_contexts(net: nn.Module, way: Way) -> dict[str, Tensor]:
        torch.manual_seed(5)
        found = {}
        for step in range(2):
            leaves = [x.clone().requires_grad_() for x in inputs]
            outputs = []
            for leaf, mask in zip(leaves, masks, strict=True):
                with batchnorm.mask(net, mask):
                    outputs.append(way(net, leaf))
            with contextlib.nullcontext() if around == "outside" else batchnorm.mask(net, masks[0]):
                found |= differentiated(net, leaves, outputs, f"of step {step}")
        return found

    expected = through_contexts(made(options), plainly)
    assert_bits(through_contexts(made(options), way), expected)
    assert torch.equal(expected["y0 of step 0"][:, 0] == 0, ~masks[0])


@each_way
def test_row_8_in_evaluation_too_a_recompute_has_its_mask(way: Way) -> None:
    x, mask = batches(1)[0], torch.rand(7, 5, 4) > 0.4
    found = []
    for one in (plainly, way):
        net, leaf = made({}).eval(), x.clone().requires_grad_()
        with batchnorm.mask(net, mask):
            y = one(net, leaf)
        torch.manual_seed(5)
        y.backward(torch.randn_like(y))
        found.append({"y": y.detach(), "dx": leaf.grad})
    assert_identical(found[1], found[0])


@each_way
def test_row_8_where_the_mask_is_in_doubt_it_raises(way: Way) -> None:
    """Never without its mask, and never with another's."""
    x = batches(1)[0]
    layer = scramble(batchnorm.BatchNorm2d(4))
    masks = [torch.rand(7, 5, 4) > 0.4 for _ in range(2)]
    outputs = []
    for mask in masks:  # one input, two masks
        leaf = x.clone().requires_grad_()
        with batchnorm.mask(layer, mask):
            outputs.append(way(layer, leaf))
    with pytest.raises(RecomputeError, match=r"^BatchNorm2d: .* two forwards had the same input"):
        outputs[0].backward(torch.randn_like(outputs[0]))

    net, chance = made({}), iter(range(9))

    def by_chance(leaf: Tensor) -> Tensor:
        return net(leaf * next(chance))

    with batchnorm.mask(net, masks[0]):
        y = way(by_chance, x.clone().requires_grad_())
        with pytest.raises(RecomputeError, match="bit for bit"):
            y.backward(torch.randn_like(y))


@each_way
def test_inputs_with_zeros_in_the_same_places_are_no_doubt(way: Way) -> None:
    """As behind ReLU or dropout: the sum of bits in such a place is 0."""
    inputs = [x.clone().index_fill_(1, torch.tensor([2]), 0.0) for x in batches(2)]
    masks = [torch.rand(7, 5, 4) > 0.4 for _ in inputs]
    found = []
    for one in (plainly, way):
        torch.manual_seed(5)
        layer, leaves = scramble(batchnorm.BatchNorm2d(4)), [x.clone().requires_grad_() for x in inputs]
        outputs = []
        for leaf, mask in zip(leaves, masks, strict=True):
            with batchnorm.mask(layer, mask):
                outputs.append(one(layer, leaf))
        found.append(differentiated(layer, leaves, outputs, ""))
    assert_bits(found[1], found[0])


@each_way
def test_one_input_under_one_mask_twice_is_no_doubt(way: Way) -> None:
    layer, x = scramble(batchnorm.BatchNorm2d(4)), batches(1)[0].requires_grad_()
    with batchnorm.mask(layer, torch.rand(7, 5, 4) > 0.4):
        y = way(layer, x) + way(layer, x)
    y.backward(torch.randn_like(y))
    assert layer.num_batches_tracked == 5


@each_way
def test_a_pass_before_any_context_had_none(way: Way) -> None:
    """What was never in a block has no mask, although its backward is in one."""
    found = []
    for one in (plainly, way):
        net, leaf = made({}), batches(1)[0].requires_grad_()
        y = one(net, leaf)
        with batchnorm.mask(net, torch.rand(7, 5, 4) > 0.4):
            torch.manual_seed(1)
            y.backward(torch.randn_like(y))
        found.append({"dx": leaf.grad})
    assert_identical(found[1], found[0])


@each_way
def test_masks_do_not_pile_up(way: Way) -> None:
    """A pass that has come again is forgotten at the next one; an inference holds nothing, wherever it is."""

    def inferred(ctx: nn.Module) -> Tensor:  # named as in the forward of an autograd Function, and none
        return ctx(x)

    net = made({})
    for x in batches(5):
        with batchnorm.mask(net, torch.rand(7, 5, 4) > 0.4):
            y = way(net, x.requires_grad_())
        y.backward(torch.randn_like(y))
        assert len(net.first._scope._passes) == 1
        assert len(net.shared._scope._passes) == 2
    net = made({}).eval()
    with torch.no_grad(), batchnorm.mask(net, torch.rand(7, 5, 4) > 0.4):
        net(x)
        inferred(net)
        assert not net.first._scope._passes
    assert net.first._scope is None


DOMAINS = {
    "frozen": ({"statistics": batchnorm.Running()}, True),
    "renorm": ({"statistics": RENORM}, True),
    "lenient": ({"small_batch": "running"}, True),
    "evaluation": ({}, False),
    "adapted": ({"statistics": batchnorm.Adapted(4)}, False),
}


@pytest.mark.one_in(3)
@every_way
@pytest.mark.parametrize(("options", "training"), DOMAINS.values(), ids=DOMAINS)
@pytest.mark.parametrize("around", ["outside", "within another"])
def test_row_8_a_recompute_has_the_domain_of_its_first_pass(
    options: dict[str, Any], training: bool, way: Way, around: str
) -> None:
    """Rows 8 and 35: gradients and the statistics of every domain."""
    found = []
    for one in (plainly, way):
        net = made({"domains": 3, **options}).train(training)
        for k in range(3):
            with batchnorm.domain(net, k):
                scramble(net.first)
                scramble(net.shared)
        leaves = [x.clone().requires_grad_() for x in batches()]
        outputs = []
        for k, leaf in enumerate(leaves):
            with batchnorm.domain(net, (k + 1) % 3):
                outputs.append(one(net, leaf))
        torch.manual_seed(5)
        with contextlib.nullcontext() if around == "outside" else batchnorm.domain(net, 2):
            result = differentiated(net, leaves, outputs)
        found.append(result | net.state_dict())
    assert_bits(found[1], found[0])
