"""`batchnorm.accumulate`: running statistics move once per optimizer step, by all of its micro-batches."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import reference
from batchnorm.errors import OptionError
from tests.support.compare import as_array, assert_close
from tests.torch.twins import assert_identical, scramble, state

POLICIES = {
    "batch": batchnorm.Batch(),
    "ghost": batchnorm.Ghost(3),
    "synced": batchnorm.Synced(),
    "renorm": batchnorm.Renorm(1.5, 0.5, r_steps=(0, 0), d_steps=(0, 0)),
    "adapted": batchnorm.Adapted(3),
}


def micro_batches(sizes: tuple[int, ...] = (6, 5, 8), offset: float = 3.0) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(n, 4, 3, 5) * (k + 1) + offset * k for k, n in enumerate(sizes)]


def norm(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    return scramble(batchnorm.BatchNorm2d(4, **options))


def after_one_update(
    layer: nn.Module, batches: list[Tensor], masks: list[Tensor] | None = None, momentum: float | None = 0.1
) -> reference.Running:
    """Return what the reference makes of the running statistics by all batches as one."""
    x = np.concatenate([as_array(b) for b in batches])
    mask = None if masks is None else np.concatenate([m.numpy() for m in masks])
    found = reference.forward(x, mask=mask)
    running = reference.Running(as_array(layer.running_mean), as_array(layer.running_var))
    count = int(layer.num_batches_tracked) + 1
    return reference.update_running_torch(
        running, found.mean[0], found.var[0], float(found.count[0]), momentum=momentum, batches=count
    )


def assert_moved(layer: nn.Module, expected: reference.Running, batches: int = 4) -> None:
    assert_close(layer.running_mean, expected.mean, dtype=torch.float32, what="running_mean")
    assert_close(layer.running_var, expected.var, dtype=torch.float32, what="running_var")
    assert layer.num_batches_tracked == batches


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("with_masks", [False, True], ids=["plain", "masked"])
def test_row_20_one_update_by_the_concatenation(
    policy: Any, with_masks: bool, momentum: float | None
) -> None:
    """Row 20: whatever normalizes the micro-batches; outputs and gradients are those of each alone."""
    layer = norm(statistics=policy, momentum=momentum)
    batches = micro_batches()
    masks = [torch.rand(len(x), 3, 5) > 0.4 for x in batches] if with_masks else None
    expected = after_one_update(layer, batches, masks, momentum)
    alone = []
    for k, x in enumerate(batches):
        one = copy.deepcopy(layer)
        alone.append(one(x, mask=None if masks is None else masks[k]))
    before = state(layer)
    with batchnorm.accumulate(layer, 3):
        for k, x in enumerate(batches):
            assert_identical(state(layer), before)  # until the last
            y = layer(x, mask=None if masks is None else masks[k])
            assert torch.equal(y, alone[k])
        assert_moved(layer, expected)
    assert_moved(layer, expected)
    assert "_accumulator" not in vars(layer)


def test_row_20_steps_follow_each_other_and_what_is_left_over_moves_at_the_end() -> None:
    """Row 20: 3, 3, and then 2."""
    layer, batches = norm(), micro_batches((6, 5, 8, 3, 9, 4, 7, 2))
    with batchnorm.accumulate(layer, 3):
        for number, part in enumerate((batches[:3], batches[3:6], batches[6:])):
            expected = after_one_update(layer, part)
            for x in part:
                layer(x)
            assert layer.num_batches_tracked == 3 + min(number + 1, 2)
    assert_moved(layer, expected, 6)


def test_one_micro_batch_per_step_is_as_without() -> None:
    layer, other = norm(), norm()
    for x in micro_batches():
        with batchnorm.accumulate(layer, 1):
            assert torch.equal(layer(x), other(x))
    assert_identical(state(layer), state(other))


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_accurate_far_from_zero(masked: bool) -> None:
    """Moments are merged, not sums: |mean| is 1e4 std."""
    layer, batches = norm(momentum=None), [x + 1e4 for x in micro_batches()]
    layer.reset_running_stats()
    masks = [torch.rand(len(x), 3, 5) > 0.4 for x in batches] if masked else None
    expected = after_one_update(layer, batches, masks, None)
    with batchnorm.accumulate(layer, 3):
        for k, x in enumerate(batches):
            layer(x, mask=None if masks is None else masks[k])
    np.testing.assert_allclose(layer.running_var.numpy(), expected.var, rtol=2e-6)
    np.testing.assert_allclose(layer.running_mean.numpy(), expected.mean, rtol=2e-7)


class Twice(nn.Module):
    """A norm that is called twice in a forward, the second time on other data."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = norm(**options)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.norm(x.flip(0).square())


def test_row_20_all_calls_of_a_layer_in_a_forward_are_pooled() -> None:
    model, batches = Twice(), micro_batches()
    expected = after_one_update(model.norm, [y for x in batches for y in (x, x.square())])
    with batchnorm.accumulate(model, 3):
        for x in batches:
            model(x)
    assert_moved(model.norm, expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_row_8_and_row_20_what_is_computed_again_is_no_forward(reentrant: bool) -> None:
    model, batches = Twice(), micro_batches()
    expected = after_one_update(model.norm, [y for x in batches for y in (x, x.square())])
    with batchnorm.accumulate(model, 3):
        for x in batches:
            y = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
            y.backward(torch.randn_like(y))
    assert_moved(model.norm, expected)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_micro_batch_with_inf_is_left_out_and_counted(momentum: float | None) -> None:
    layer, batches = norm(nonfinite="skip", momentum=momentum), micro_batches((6, 5, 8, 4))
    batches[1][2, 3, 1, 1] = torch.nan
    expected = after_one_update(layer, [batches[0], *batches[2:]], momentum=momentum)
    with batchnorm.accumulate(layer, 4):
        for x in batches:
            layer(x)
    assert_moved(layer, expected)
    assert layer.skipped == 1
    before = state(layer)
    with batchnorm.accumulate(layer, 2):
        for _ in range(2):
            layer(batches[1])
    assert_identical(state(layer), before)  # a step of nothing else is no batch
    assert layer.skipped == 3


def test_empty_and_all_masked_micro_batches() -> None:
    """As one batch that is empty: it counts, and moves nothing; beside others it adds nothing."""
    layer, batches = norm(), micro_batches()
    expected = after_one_update(layer, batches)
    with batchnorm.accumulate(layer, 5):
        layer(torch.randn(0, 4, 3, 5))
        for x in batches:
            layer(x)
        layer(batches[0], mask=torch.zeros(6, 3, 5, dtype=torch.bool))
    assert_moved(layer, expected)
    before = state(layer)
    with batchnorm.accumulate(layer, 2):
        layer(torch.randn(0, 4, 3, 5))
    before["num_batches_tracked"] += 1
    assert_identical(state(layer), before)


def test_an_exception_moves_nothing() -> None:
    layer, batches = norm(), micro_batches()
    before = state(layer)

    def interrupted() -> None:
        with batchnorm.accumulate(layer, 4):
            for x in batches:
                layer(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert_identical(state(layer), before)
    assert "_accumulator" not in vars(layer)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    layer(batches[0])
    assert layer.num_batches_tracked == 4


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    """As if it had not been: out of memory, caught and tried again, or left out."""

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm()

        def forward(self, x: Tensor, fails: bool = False) -> Tensor:
            y = self.norm(x)
            if fails:
                raise MemoryError
            return y

    model, batches = Failing(), micro_batches()
    expected = after_one_update(model.norm, batches)
    with batchnorm.accumulate(model, 3):
        for x in batches:
            with pytest.raises(MemoryError):
                model(x * 7, fails=True)
            model(x)
        with pytest.raises(MemoryError):
            model(x * 7, fails=True)
    assert_moved(model.norm, expected)


def test_forwards_in_evaluation_do_not_count() -> None:
    layer, batches = norm(), micro_batches()
    expected = after_one_update(layer, batches)
    with batchnorm.accumulate(layer, 3):
        for x in batches:
            layer.eval()(x)
            layer.train()(x)
    assert_moved(layer, expected)


def test_frozen_and_untracked_norms_are_left() -> None:
    model = nn.Sequential(
        norm(statistics=batchnorm.Running()), norm(track_running_stats=False), norm(), norm(affine=False)
    )
    before = state(model[0])
    with batchnorm.accumulate(model, 2):
        for x in micro_batches((4, 4)):
            model(x)
    assert_identical(state(model[0]), before)
    assert [int(model[k].num_batches_tracked) for k in (2, 3)] == [4, 4]


def test_row_20_and_row_35_each_domain_has_micro_batches_of_its_own() -> None:
    layer, batches = norm(domains=2), micro_batches((6, 5, 8, 4))
    expected = []
    for k in range(2):
        with batchnorm.domain(layer, k):
            scramble(layer)
            expected.append(after_one_update(layer, batches[k::2]))
    with batchnorm.accumulate(layer, 4):
        for number, x in enumerate(batches):
            with batchnorm.domain(layer, number % 2):
                layer(x)
    for k in range(2):
        with batchnorm.domain(layer, k):
            assert_moved(layer, expected[k])


def test_masks_of_the_model_count() -> None:
    layer, batches = norm(), micro_batches()
    masks = [torch.rand(len(x), 3, 5) > 0.4 for x in batches]
    expected = after_one_update(layer, batches, masks)
    with batchnorm.accumulate(layer, 3):
        for x, mask in zip(batches, masks, strict=True):
            with batchnorm.mask(layer, mask):
                layer(x)
    assert_moved(layer, expected)


def test_it_holds_three_numbers_per_channel() -> None:
    """Nothing keeps a micro-batch alive, and the graph of none is held."""
    layer = norm()
    with batchnorm.accumulate(layer, 9):
        for x in micro_batches():
            layer(x.requires_grad_())
        (kept,) = layer._accumulator._all.values()
        assert all(t.numel() == 4 and not t.requires_grad for t in kept.moments if isinstance(t, Tensor))
        others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        for other in others:
            assert other._accumulator is None
            other(micro_batches()[0])
            assert other.num_batches_tracked == 4


def test_the_model_may_move_in_between() -> None:
    layer, batches = norm(), micro_batches()
    expected = after_one_update(layer, batches)
    with batchnorm.accumulate(layer, 3):
        layer(batches[0])
        layer.double()
        for x in batches[1:]:
            layer(x.double())
    assert layer.running_mean.dtype is torch.float64
    assert_moved(layer, expected)


def test_what_cannot_be_is_refused_by_name() -> None:
    for steps in (0, -1, 2.0, True, None):
        with pytest.raises(OptionError, match="steps must be a whole number"):
            batchnorm.accumulate(norm(), steps).__enter__()
    with pytest.raises(OptionError, match="no batch normalization to accumulate"):
        batchnorm.accumulate(nn.Linear(2, 2), 2).__enter__()
    model = nn.Sequential(norm(), nn.Sequential(nn.BatchNorm2d(4)))
    with pytest.raises(OptionError, match=r"^1\.0 \(torch.nn.BatchNorm2d\): .*convert\(model\) first"):
        batchnorm.accumulate(model, 2).__enter__()
    model = nn.Sequential(norm(), norm(statistics=batchnorm.Ghost(2, sequential=True)))
    with pytest.raises(OptionError, match=r"^1 \(batchnorm.BatchNorm2d\): statistics=Ghost\(size=2"):
        batchnorm.accumulate(model, 2).__enter__()
    model = nn.Sequential(norm())
    with (
        batchnorm.accumulate(model, 2),
        pytest.raises(OptionError, match=r"^0 \(batchnorm.BatchNorm2d\): it is in another"),
    ):
        batchnorm.accumulate(model, 2).__enter__()
    assert not model._forward_hooks


@pytest.mark.parametrize("inner", [False, True], ids=["the compiled one", "the model inside"])
@pytest.mark.parametrize("skip", [False, True], ids=["propagate", "skip"])
def test_compiled_models_accumulate(inner: bool, skip: bool) -> None:
    torch.compiler.reset()
    model = Twice(nonfinite="skip" if skip else "propagate")
    batches = micro_batches((6, 6, 6, 6))
    compiled = torch.compile(model, backend="eager")
    for part in (batches[:2], batches[2:]):
        expected = after_one_update(model.norm, [y for x in part for y in (x, x.square())])
        count = int(model.norm.num_batches_tracked)
        with batchnorm.accumulate(model if inner else compiled, 2):
            for x in part:
                compiled(x)
        assert_moved(model.norm, expected, count + 1)
    compiled(batches[0])
    assert model.norm.num_batches_tracked == count + 3
    torch.compiler.reset()
