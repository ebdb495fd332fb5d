"""Row 2: what is masked is in no statistic, output or gradient, whatever it is; padding changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import batchnorm
from batchnorm import functional, kernels
from batchnorm.errors import InputTypeError, OptionError
from batchnorm.statistics.policy import Policy
from tests.torch.twins import assert_identical, assert_same, scramble, state, step

RENORM = batchnorm.Renorm(1.5, 0.5, (0, 0), (0, 0))
TRAINING = [
    batchnorm.Batch(),
    batchnorm.Ghost(2),
    batchnorm.Ghost(3, sequential=True),
    RENORM,
    batchnorm.Running(),
]
EVALUATION = [batchnorm.Batch(), batchnorm.Adapted(3.0)]
CALLS = pytest.mark.parametrize(
    ("policy", "training"),
    [*((policy, True) for policy in TRAINING), *((policy, False) for policy in EVALUATION)],
    ids=lambda value: str(value) if isinstance(value, Policy) else ("train" if value else "eval"),
)
ENGINES = pytest.mark.parametrize("engine", ["cpu", "eager"])
SHAPES = {2: (8, 5), 3: (6, 5, 9), 4: (5, 5, 4, 3), 5: (4, 5, 2, 3, 2)}
KINDS = {
    2: batchnorm.BatchNorm1d,
    3: batchnorm.BatchNorm1d,
    4: batchnorm.BatchNorm2d,
    5: batchnorm.BatchNorm3d,
}


def random_mask(shape: tuple[int, ...]) -> Tensor:
    """Return a mask that leaves out about a third, and all of the last sample."""
    mask = torch.rand((shape[0], *shape[2:])) > 0.35
    mask[-1] = False
    return mask


@pytest.mark.parametrize("policy", [batchnorm.Batch(), RENORM, batchnorm.Running()], ids=str)
@ENGINES
def test_row_2_padded_equals_unpadded(policy: Policy, engine: str) -> None:
    """Row 2: sequences with padding, and their values one after the other: the same numbers and counts."""
    layer = scramble(batchnorm.BatchNorm1d(5, statistics=policy, activation="silu", dtype=torch.float64))
    start, lengths = state(layer), torch.tensor([9, 4, 0, 1, 7])
    x, dy, residual = (torch.randn(5, 5, 9, dtype=torch.float64) + 1 for _ in range(3))
    mask = torch.arange(9) < lengths.unsqueeze(1)

    def unpadded(values: Tensor) -> Tensor:
        return values.movedim(1, -1)[mask]

    with kernels.use(engine):
        padded = step(layer, x, dy, residual, lengths=lengths)
        layer.load_state_dict(start)
        same = step(layer, x, dy, residual, mask=mask)
        layer.load_state_dict(start)
        expected = step(layer, *map(unpadded, (x, dy, residual)))
    assert_identical(padded, same)
    for name in ("y", "dx", "dresidual"):
        assert not padded[name].movedim(1, -1)[~mask].any()
        padded[name] = unpadded(padded[name])
    assert_same(padded, expected, tolerance=(1e-12, 1e-12))


@pytest.mark.parametrize("garbage", [math.nan, 1e30])
@pytest.mark.parametrize("rank", SHAPES)
@CALLS
@ENGINES
def test_row_2_what_is_masked_has_no_influence(
    policy: Policy, training: bool, rank: int, garbage: float, engine: str
) -> None:
    """Row 2: bit for bit the same, whatever stands there in input, residual and cotangent."""
    layer = scramble(KINDS[rank](5, statistics=policy, activation="gelu", nonfinite="skip")).train(training)
    start, mask, found = state(layer), random_mask(SHAPES[rank]), []
    tensors = [torch.randn(SHAPES[rank]) + 1 for _ in range(3)]
    for value in (0.0, garbage):
        x, dy, residual = (t.masked_fill(~mask.unsqueeze(1), value) for t in tensors)
        layer.load_state_dict(start)
        with kernels.use(engine):
            found.append(step(layer, x, dy, residual, mask=mask))
    assert_identical(found[1], found[0])
    assert layer.skipped == 0
    for name in ("y", "dx", "dresidual"):
        assert not found[0][name].movedim(1, -1)[~mask].any()


@CALLS
@ENGINES
def test_row_2_a_mask_of_nothing_is_an_empty_batch(policy: Policy, training: bool, engine: str) -> None:
    """Row 2: output and gradients are zero, the statistics stay, and it counts as the empty batch does."""
    layer = scramble(batchnorm.BatchNorm1d(5, statistics=policy)).train(training)
    start, x, mask = state(layer), torch.full((6, 5, 9), math.nan), torch.zeros(6, 9, dtype=torch.bool)
    with kernels.use(engine):
        found = step(layer, x, x, mask=mask)
        layer.load_state_dict(start)
        empty = step(layer, x[:0], x[:0])
    for name in ("y", "dx", "dweight", "dbias"):
        assert not found.pop(name).any()
        assert not empty.pop(name).any()
    batches = [one.pop("num_batches_tracked") - start["num_batches_tracked"] for one in (found, empty)]
    running = ("running_mean", "running_var")
    for one in (found, empty):
        assert_identical({name: one[name] for name in running}, {name: start[name] for name in running})
    # A sequence of ghost batches without values is one of as many batches.
    groups = 2 if policy == batchnorm.Ghost(3, sequential=True) else 1
    moves = training and policy != batchnorm.Running()
    assert batches == [groups, 1] if moves else batches == [0, 0]


@ENGINES
def test_row_19_one_value_that_counts_has_no_variance(engine: str) -> None:
    """Row 19: a mask cannot be counted without waiting for the device: y is the bias; or the running ones."""
    mask = torch.tensor([[False, True], [False, False]])
    x, dy = torch.randn(2, 5, 2), torch.randn(2, 5, 2)
    for small_batch in ("raise", "running"):
        layer = scramble(batchnorm.BatchNorm1d(5, small_batch=small_batch))
        before = state(layer)
        with kernels.use(engine):
            found = step(layer, x, dy, mask=mask)
            expected = step(layer.eval(), x, dy, mask=mask)
        if small_batch == "raise":
            torch.testing.assert_close(found["y"][0, :, 1], layer.bias.detach())
            # In units of 1/std, which is that of eps.
            assert (found["dx"] * layer.eps**0.5).abs().max() < 2e-6
        else:
            for name in ("y", "dx", "dweight", "dbias"):
                torch.testing.assert_close(found[name], expected[name])
        before["num_batches_tracked"] += 1
        assert_identical({n: found[n] for n in before}, before)


def test_lengths_are_of_sequences_and_stand_alone() -> None:
    layer, lengths = batchnorm.BatchNorm1d(5), torch.tensor([2, 3])
    with pytest.raises(OptionError, match="BatchNorm1d: mask and lengths say the same thing twice"):
        layer(torch.randn(2, 5, 3), mask=torch.ones(2, 3, dtype=torch.bool), lengths=lengths)
    with pytest.raises(OptionError, match=r"got an input of shape \[2, 5\]: pass mask= instead"):
        layer(torch.randn(2, 5), lengths=lengths)
    with pytest.raises(OptionError, match="lengths must be 0 to 2, the length of the input; got 2 to 3"):
        layer(torch.randn(2, 5, 2), lengths=lengths)
    with pytest.raises(InputTypeError, match=r"a tensor of integers, .*; got list"):
        layer(torch.randn(2, 5, 3), lengths=[2, 3])
    with pytest.raises(InputTypeError, match="bool tensor, True = the value counts; got float32"):
        layer(torch.randn(2, 5, 3), mask=torch.ones(2, 3))
    assert layer.num_batches_tracked == 0


def test_functions_take_masks_on_any_axis() -> None:
    """The mask has the input's axes without the channels', wherever these are."""
    x, mask = torch.randn(4, 3, 5, 2, dtype=torch.float64), torch.rand(4, 5, 2) > 0.3
    running = [torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5]
    found = []
    for axis in (1, 2, 3, -1):
        moved = [t.clone() for t in running]
        y = functional.batch_norm(x.movedim(1, axis), *moved, training=True, mask=mask, axis=axis)
        found.append(torch.cat([y.movedim(axis, 1).flatten(), *moved]))
    y, *moved = functional.pure_batch_norm(x, *running, training=True, mask=mask)
    for one in found:
        torch.testing.assert_close(one, torch.cat([y.flatten(), *moved]), rtol=1e-13, atol=1e-13)
