"""Renormalization and adaptation in the reference: values by formula, gradients by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest

from batchnorm.reference import ACTIVATIONS, Corrected, Running, adapted, backward, forward, moments, renorm
from tests.support.cases import KINKS

EPS = 1e-3
STEP = 1e-5
MASK = np.array([[True, True], [True, False], [False, True], [False, False]])
MASKS = {"all": None, "masked": MASK}
# Batch statistics are near mean 0.4, var 2.2: r and d end within their bounds and at either of them.
RUNNING = Running(np.array([0.3, 30.0, -30.0]), np.array([1.9, 0.02, 90.0]))
BOUNDS = {"open": (1e3, 1e3), "bounded": (1.4, 0.5), "closed": (1.0, 0.0)}

Leaves = dict[str, np.ndarray]


def inputs(seed: int) -> tuple[Leaves, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (4, 3, 2)
    leaves = {
        "x": rng.normal(0.4, 1.5, size=shape),
        "weight": np.array([-1.3, 2.1, 0.6]),
        "bias": np.array([0.4, -0.7, 0.2]),
        "residual": rng.normal(0.2, 1.0, size=shape),
    }
    return leaves, rng.normal(size=shape)


def away_from_kinks(
    z_of: Callable[[Leaves], np.ndarray], activation: str | None, mask: np.ndarray | None
) -> tuple[Leaves, np.ndarray]:
    """The first inputs whose z a step of the differences does not carry over a kink."""
    for seed in count():
        leaves, dy = inputs(seed)
        z = np.moveaxis(z_of(leaves), 1, -1)[np.ones((4, 2), dtype=bool) if mask is None else mask]
        if all((np.abs(z - kink) > 1e-2).all() for kink in KINKS.get(activation or "", ())):
            return leaves, dy
    raise AssertionError("unreachable")


def assert_gradients(
    found: Corrected, leaves: Leaves, dy: np.ndarray, function: Callable[[Leaves], np.ndarray]
) -> None:
    """Raise unless the gradients are the limits of differences of the function."""
    for name, at in leaves.items():
        differences = np.empty_like(at)
        for index in np.ndindex(at.shape):
            move = np.zeros_like(at)
            move[index] = STEP
            ahead, behind = (float((function(leaves | {name: at + m}) * dy).sum()) for m in (move, -move))
            differences[index] = (ahead - behind) / (2 * STEP)
        gradient = getattr(found.gradients, f"d{name}")
        np.testing.assert_allclose(gradient, differences, rtol=1e-7, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_renorm_is_its_formula_and_its_gradient_the_limit_of_differences(
    activation: str | None, bounds: str, mask: str
) -> None:
    """r and d, taken where the gradient is, are held: they are constants to it."""
    r_max, d_max = BOUNDS[bounds]
    counts = MASKS[mask]

    def constants(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = moments(x, counts)
        std, running_std = np.sqrt(found.var[0] + EPS), np.sqrt(RUNNING.var + EPS)
        r = np.minimum(np.maximum(std / running_std, 1 / r_max), r_max)
        d = np.minimum(np.maximum((found.mean[0] - RUNNING.mean) / running_std, -d_max), d_max)
        return r.reshape(1, 3, 1), d.reshape(1, 3, 1)

    def value(leaves: Leaves, held: tuple[np.ndarray, np.ndarray], activation: str | None) -> np.ndarray:
        r, d = held
        xhat = forward(leaves["x"], eps=EPS, mask=counts).y
        weight, bias = (leaves[name].reshape(1, 3, 1) for name in ("weight", "bias"))
        y = ACTIVATIONS[activation].value(weight * (xhat * r + d) + bias + leaves["residual"])
        return y if counts is None else np.where(counts[:, None], y, 0.0)

    leaves, dy = away_from_kinks(lambda v: value(v, constants(v["x"]), None), activation, counts)
    held = constants(leaves["x"])
    options: dict[str, Any] = {"mask": counts, "activation": activation}
    found = renorm(dy=dy, running=RUNNING, r_max=r_max, d_max=d_max, eps=EPS, **leaves, **options)
    np.testing.assert_allclose(found.y, value(leaves, held, activation), rtol=1e-12, atol=1e-12)
    assert_gradients(found, leaves, dy, lambda v: value(v, held, activation))
    if bounds == "closed":
        plain = backward(dy=dy, eps=EPS, **leaves, **options)
        for ours, theirs in zip(found.gradients, plain, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("prior", [0.0, 3.0, 1e9])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_adapted_is_its_formula_and_its_gradient_the_limit_of_differences(
    activation: str | None, prior: float, mask: str
) -> None:
    counts = MASKS[mask]
    samples = 4 if counts is None else 3  # one has no value that counts

    def value(leaves: Leaves, activation: str | None = activation) -> np.ndarray:
        found = moments(leaves["x"], counts)
        share = samples / (samples + prior)
        mean = share * found.mean[0] + (1 - share) * RUNNING.mean
        var = share * found.var[0] + (1 - share) * RUNNING.var
        return forward(mean=mean, var=var, eps=EPS, mask=counts, activation=activation, **leaves).y

    leaves, dy = away_from_kinks(lambda v: value(v, None), activation, counts)
    found = adapted(
        dy=dy, running=RUNNING, prior=prior, eps=EPS, mask=counts, activation=activation, **leaves
    )
    np.testing.assert_allclose(found.y, value(leaves), rtol=1e-12, atol=1e-12)
    assert_gradients(found, leaves, dy, value)


def test_adapted_to_nothing_is_given_statistics() -> None:
    """No sample counts: s = 0, with a prior of 0 too; nothing is divided by it."""
    leaves, dy = inputs(0)
    nothing = np.zeros((4, 2), dtype=bool)
    found = adapted(dy=dy, running=RUNNING, prior=0.0, eps=EPS, mask=nothing, **leaves)
    assert not found.y.any()
    assert not found.gradients.dx.any()
