"""Forward and backward pass against torch in float64, and the backward pass against finite differences."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.reference import ACTIVATIONS, backward, forward
from tests.support.cases import CASES, KINKS, Case, Inputs
from tests.support.compare import as_array, assert_close, reference_results

from .test_activations import TORCH

EPS = 1e-3

# At 1e6 torch's own float64 mean is off by 1e-10 std; there the comparison is with the same values shifted.
near_cases = pytest.mark.parametrize("case", [c for c in CASES if c.offset <= 1e3], ids=str)
far_cases = pytest.mark.parametrize("case", [c for c in CASES if c.offset > 1e3], ids=str)


def widened(inputs: Inputs) -> Inputs:
    """The inputs in float64, with gradients, but for the mask and the cotangent."""
    x, weight, bias, residual, dy, mask = (None if t is None else t.contiguous() for t in inputs)
    x, weight, bias, residual = (
        None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, residual)
    )
    return Inputs(x, weight, bias, residual, dy.double(), mask)


def by_torch(case: Case, inputs: Inputs, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    """y by torch: `F.batch_norm` on the counted values of each group alone, put back in their places."""
    x, weight, bias, residual, _, mask = inputs
    channels_last = x.movedim(1, -1)
    mask = torch.ones(channels_last.shape[:-1], dtype=torch.bool) if mask is None else mask
    size = case.group_size or max(len(x), 1)
    normalized = torch.zeros(channels_last.shape, dtype=torch.float64, requires_grad=True)
    for start in range(0, len(x), size):
        here = mask.clone()
        here[:start] = here[start + size :] = False
        if not here.any():
            continue
        # Values of a channel side by side, whose sums torch rounds less; alike for any number of threads.
        of_group = F.batch_norm(
            channels_last[here].T.unsqueeze(0),
            mean,
            var,
            weight,
            bias,
            training=mean is None,
            momentum=0.0,
            eps=EPS,
        )
        normalized = normalized.index_put((here,), of_group.squeeze(0).T)
    z = normalized.movedim(-1, 1)
    if residual is not None:
        z = z + torch.where(mask[:, None], residual, 0.0)
    return torch.where(mask[:, None], TORCH[case.activation](z), 0.0)


def assert_agrees_with_torch(case: Case, mean: Tensor | None = None, var: Tensor | None = None) -> None:
    """Raise unless y and all gradients are those of torch in float64."""
    inputs = case.make(seed=1)
    ours = reference_results(case, inputs, eps=EPS, mean=mean, var=var)
    wide = widened(inputs)
    y = by_torch(case, wide, mean, var)
    dy = wide.dy if wide.mask is None else torch.where(wide.mask[:, None], wide.dy, 0.0)
    leaves = {"dx": wide.x, "dweight": wide.weight, "dbias": wide.bias, "dresidual": wide.residual}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True, materialize_grads=True)

    assert_close(ours.y, y, dtype=torch.float64, what="y")
    assert (ours.dresidual is None) == (wide.residual is None)
    for name, theirs in zip(leaves, grads, strict=True):
        scale = ours.std if name == "dx" else 1.0
        assert_close(getattr(ours, name), theirs, dtype=torch.float64, scale=scale, what=name)


@near_cases
def test_batch_statistics_agree_with_torch(case: Case) -> None:
    assert_agrees_with_torch(case)


@near_cases
def test_given_statistics_agree_with_torch(case: Case) -> None:
    channels = case.shape[1]
    mean = torch.linspace(-1, 2, channels, dtype=torch.float64)
    var = torch.linspace(0.5, 3, channels, dtype=torch.float64)
    assert_agrees_with_torch(case, mean, var)


@far_cases
def test_a_shift_changes_nothing(case: Case) -> None:
    inputs = case.make(seed=1)
    x = inputs.x.double()
    axes = (0, *range(2, x.ndim))
    # Both x and the rounded mean are float32 values of one size: their difference is exact.
    shift = x.nan_to_num().amax(axes, keepdim=True) + x.nan_to_num().amin(axes, keepdim=True)
    shifted = inputs._replace(x=x - shift.float().double())
    far, near = reference_results(case, inputs), reference_results(case, shifted)
    for name in ("y", "dx", "dweight", "dresidual"):
        if getattr(near, name) is not None:
            scale = near.std if name == "dx" else 1.0
            # The mean is rounded to float64: 1e6 * 2^-53 = 1.1e-10 std, times the weight, times n / sqrt(n).
            ours, theirs = scale * getattr(far, name), scale * getattr(near, name)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * (1 + np.abs(theirs).max()))


def test_statistics_are_returned_per_group() -> None:
    x = np.random.default_rng(0).normal(2, 3, size=(5, 4, 6))
    ours = forward(x, group_size=2, eps=EPS)
    for group, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 5))):
        np.testing.assert_allclose(ours.mean[group], x[rows].mean(axis=(0, 2)), rtol=1e-13)
        np.testing.assert_allclose(ours.var[group], x[rows].var(axis=(0, 2)), rtol=1e-13)
    np.testing.assert_array_equal(ours.count, [12, 12, 6])
    np.testing.assert_allclose(ours.rstd, (ours.var + EPS) ** -0.5, rtol=1e-15)


def test_given_statistics_are_returned_as_one_group() -> None:
    x, mean, var = np.ones((5, 2)), np.array([1.0, 2.0]), np.array([3.0, 4.0])
    ours = forward(x, mean=mean, var=var, group_size=2, mask=np.array([True, False, True, False, False]))
    np.testing.assert_array_equal(ours.mean, mean[None])
    np.testing.assert_array_equal(ours.var, var[None])
    assert ours.count == [2]


@pytest.mark.parametrize("given", ["mean", "var"])
def test_one_given_statistic_without_the_other_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="together"):
        forward(np.ones((3, 2)), **{given: np.ones(2)})


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e200])
def test_nothing_leaks_from_masked_positions(garbage: float) -> None:
    case = Case("leak", (7, 3, 5), masked=True, group_size=3, residual=True, activation="gelu")
    inputs = case.make()
    dirty = [None if t is None else t.double().nan_to_num(nan=garbage) for t in inputs[:-1]]
    ours, theirs = reference_results(case, Inputs(*dirty, inputs.mask)), reference_results(case, inputs)
    masked = ~np.broadcast_to(inputs.mask.numpy()[:, None], case.shape)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)
    for values in (ours.y, ours.dx, ours.dresidual):
        assert not values[masked].any()


OPTIONS = {
    "batch": {},
    "masked": {"mask": np.array([[True, True], [True, False], [False, True], [True, True]])},
    "groups": {"group_size": 3},
    "masked groups": {
        "mask": np.array([[True, True], [True, False], [True, True], [True, True]]),
        "group_size": 3,
    },
    "given": {"mean": np.array([0.3, -0.6]), "var": np.array([1.4, 0.7])},
    "given, masked": {
        "mean": np.array([0.3, -0.6]),
        "var": np.array([1.4, 0.7]),
        "mask": np.array([[True, True], [True, False], [False, True], [False, False]]),
    },
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_backward_is_the_limit_of_differences(activation: str | None, options: str) -> None:
    chosen = OPTIONS[options] | {"activation": activation, "eps": EPS}
    leaves, dy = away_from_kinks(activation, OPTIONS[options])

    def loss(name: str, value: np.ndarray) -> float:
        return float((forward(**(leaves | {name: value}), **chosen).y * dy).sum())

    ours = backward(dy=dy, **leaves, **chosen)
    step = 1e-5
    for name, at in leaves.items():
        differences = np.empty_like(at)
        for index in np.ndindex(at.shape):
            move = np.zeros_like(at)
            move[index] = step
            differences[index] = (loss(name, at + move) - loss(name, at - move)) / (2 * step)
        np.testing.assert_allclose(getattr(ours, f"d{name}"), differences, rtol=1e-7, atol=1e-8, err_msg=name)


def away_from_kinks(
    activation: str | None, options: dict[str, object]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The first random inputs `[4, 2, 2]` whose z a step of the differences does not carry over a kink."""
    for seed in count():
        rng = np.random.default_rng(seed)
        leaves = {
            "x": rng.normal(0.4, 1.5, size=(4, 2, 2)),
            "weight": np.array([-1.3, 2.1]),
            "bias": np.array([0.4, -0.7]),
            "residual": rng.normal(0.2, 1.0, size=(4, 2, 2)),
        }
        z = forward(**leaves, **options, eps=EPS).y
        counted = options.get("mask", np.ones((4, 2), dtype=bool))
        z = np.moveaxis(z, 1, -1)[counted]
        if all((np.abs(z - kink) > 1e-2).all() for kink in KINKS.get(activation, ())):
            return leaves, rng.normal(size=(4, 2, 2))
    raise AssertionError("unreachable")


def test_gradients_of_missing_parameters_are_those_of_one_and_zero() -> None:
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    for ours, theirs in zip(backward(x, dy), backward(x, dy, np.ones(3), np.zeros(3)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_inputs_are_not_written_to() -> None:
    case = Case("inputs", (7, 3, 5), masked=True, group_size=3, residual=True, activation="relu")
    inputs = [None if t is None else as_array(t) for t in case.make()]
    x, weight, bias, residual, dy, _ = inputs
    options = {"residual": residual, "mask": inputs[-1].astype(bool), **case.options}
    before = [value.copy() for value in inputs]
    forward(x, weight, bias, **options)
    backward(x, dy, weight, bias, **options)
    for now, then in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(now, then)
