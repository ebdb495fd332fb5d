"""Policies and masks under `torch.func`, forward mode and double backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import batchnorm
from batchnorm import functional
from batchnorm.statistics.policy import Policy

# Within the bounds, r and d follow the batch, and are constants to the gradient alone: differences see them
# move. Held by the bounds, they are constants to both.
HELD = batchnorm.Renorm(1.0, 0.05, (0, 0), (0, 0))
CALLS = {
    "batch": (batchnorm.Batch(), True),
    "ghost": (batchnorm.Ghost(3), True),
    "ghost-sequential": (batchnorm.Ghost(2, sequential=True), True),
    "renorm": (HELD, True),
    "running": (batchnorm.Running(), True),
    "adapted": (batchnorm.Adapted(2.0), False),
    "evaluation": (batchnorm.Batch(), False),
}
EVERY_CALL = pytest.mark.parametrize(("policy", "training"), CALLS.values(), ids=CALLS)
MASKED = pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def arguments(shape: tuple[int, ...] = (5, 2, 3)) -> tuple[Tensor, ...]:
    """Return x, running mean (far from x's) and variance, weight, bias."""
    channels = shape[1]
    return random(*shape) + 4, random(channels), random(channels).exp(), random(channels), random(channels)


def mask_of(shape: tuple[int, ...], masked: bool) -> Tensor | None:
    """Return a mask under which each ghost batch of two has a few values."""
    if not masked:
        return None
    mask = torch.rand(shape[0], *shape[2:]) > 0.3
    mask[:, 0] = True
    return mask


@pytest.mark.parametrize(("activation", "masked"), [("tanh", True), (None, False)], ids=["masked", "all"])
@EVERY_CALL
def test_first_and_second_derivatives(
    policy: Policy, training: bool, activation: str | None, masked: bool
) -> None:
    """Against finite differences: reverse, forward, batched, and twice."""
    x, mean, var, weight, bias = arguments()
    residual, mask = random(*x.shape), mask_of(x.shape, masked)
    inputs = tuple(t.requires_grad_() for t in (x, weight, bias, residual))

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return functional.batch_norm(
            x, mean.clone(), var.clone(), weight, bias, training,
            residual=residual, activation=activation, mask=mask, statistics=policy,
        )  # fmt: skip

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)


def pure(policy: Policy, training: bool, mask: Tensor | None, **options: Any) -> Any:
    """Return the pure function of (x, mean, var, weight, bias)."""
    return lambda *tensors: functional.pure_batch_norm(
        *tensors, training=training, mask=mask, statistics=policy, momentum=0.3, **options
    )


@MASKED
@EVERY_CALL
def test_row_30_grad_and_jvp_are_autograd_s(policy: Policy, training: bool, masked: bool) -> None:
    """Row 30: over input and parameters at once; by kernels on one side, plain operations on the other."""
    tensors = arguments()
    call = pure(policy, training, mask_of(tensors[0].shape, masked), activation="silu")
    cotangent, leaves = (
        random(*tensors[0].shape),
        [t.clone().requires_grad_(i in (0, 3, 4)) for i, t in enumerate(tensors)],
    )
    y, *moved = call(*leaves)
    expected = torch.autograd.grad(y, [leaves[i] for i in (0, 3, 4)], cotangent)
    found = grad(lambda *t: (call(*t)[0] * cotangent).sum(), argnums=(0, 3, 4))(*tensors)
    torch.testing.assert_close(found, expected, **CLOSE)
    tangents = [random(*t.shape) if i in (0, 3, 4) else torch.zeros_like(t) for i, t in enumerate(tensors)]
    (y_again, *moved_again), (tangent, *moved_tangents) = jvp(call, tensors, tuple(tangents))
    torch.testing.assert_close([y_again, *moved_again], [y.detach(), *moved], **CLOSE)
    assert not any(t.any() for t in moved_tangents)  # no gradient flows into running statistics
    product = sum((t * tangents[i]).sum() for t, i in zip(expected, (0, 3, 4), strict=True))
    torch.testing.assert_close((tangent * cotangent).sum(), product, **CLOSE)


@MASKED
@EVERY_CALL
def test_row_30_vmap_is_a_loop(policy: Policy, training: bool, masked: bool) -> None:
    """Row 30: over inputs, statistics, parameters and masks, each with its own."""
    stacked = [torch.stack(column) for column in zip(*(arguments() for _ in range(4)), strict=True)]
    masks = torch.stack([mask_of((5, 2, 3), True) for _ in range(4)]) if masked else None

    def call(mask: Tensor | None, *tensors: Tensor) -> Any:
        return pure(policy, training, mask)(*tensors)

    found = vmap(call, in_dims=(0 if masked else None, *[0] * 5))(masks, *stacked)
    loop = [call(None if masks is None else masks[i], *(t[i] for t in stacked)) for i in range(4)]
    expected = tuple(torch.stack(parts) for parts in zip(*loop, strict=True))
    torch.testing.assert_close(found, expected, **CLOSE)


@EVERY_CALL
def test_row_30_both_jacobians_agree(policy: Policy, training: bool) -> None:
    """Row 30: forward over reverse and the other way round."""
    x, *rest = arguments((4, 2, 2))
    call = pure(policy, training, mask_of(x.shape, True))
    by_row, by_column = (j(lambda x: call(x, *rest)[0].sin())(x) for j in (jacrev, jacfwd))
    torch.testing.assert_close(by_row, by_column, **CLOSE)
    twice = [
        a(b(lambda x: call(x, *rest)[0].sin().sum()))(x) for a, b in ((jacfwd, jacrev), (jacrev, jacfwd))
    ]
    torch.testing.assert_close(*twice, **CLOSE)
