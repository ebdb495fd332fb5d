"""The reference's answer for a layer with a statistics policy, in Keras's conventions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

import batchnorm
from batchnorm import reference
from batchnorm.keras import BatchNormalization
from batchnorm.statistics.policy import Policy

from .gradients import Array

EPSILON = 1e-3
MOMENTUM = 0.9
OPEN = {"r_steps": (0, 0), "d_steps": (0, 0)}


class Case(NamedTuple):
    """A policy, the mode, and how many batches the layer has seen."""

    policy: Policy
    training: bool = True
    batches: int = 0


CASES = {
    "batch": Case(batchnorm.Batch()),
    "ghost": Case(batchnorm.Ghost(3)),
    "ghost-even": Case(batchnorm.Ghost(4)),
    "ghost-of-one": Case(batchnorm.Ghost(1)),
    "ghost-in-turn": Case(batchnorm.Ghost(3, sequential=True)),
    "ghost-in-inference": Case(batchnorm.Ghost(3), training=False),
    "renorm": Case(batchnorm.Renorm(1.3, 0.4, **OPEN)),
    "renorm-half-open": Case(batchnorm.Renorm(1.6, 0.8, r_steps=(10, 30), d_steps=(0, 40)), batches=20),
    "renorm-in-inference": Case(batchnorm.Renorm(), training=False, batches=7),
    "running": Case(batchnorm.Running()),
    "adapted": Case(batchnorm.Adapted(4.0)),
    "adapted-in-inference": Case(batchnorm.Adapted(4.0), training=False),
    "adapted-by-the-batch": Case(batchnorm.Adapted(0.0), training=False),
    "synced": Case(batchnorm.Synced()),
    "synced-ghost": Case(batchnorm.Synced(over=batchnorm.Ghost(3))),
    "synced-renorm": Case(batchnorm.Synced(over=batchnorm.Renorm(1.3, 0.4, **OPEN))),
}


class Expected(NamedTuple):
    """The layer's results and its state afterwards; float64, channels on axis 1.

    Attributes:
        y, dx: `[N, C, *S]`; 0 at masked positions.
        dgamma, dbeta: `[C]`.
        std: broadcasts against dx: puts it in units of 1/std.
        mean, var: `[C]`, the moving statistics.
    """

    y: Array
    dx: Array
    dgamma: Array
    dbeta: Array
    std: Array
    mean: Array
    var: Array


def shown(policy: Policy) -> Policy:
    """Return the policy that means the same within one process."""
    return policy.over if isinstance(policy, batchnorm.Synced) else policy


def expected(case: Case, x: Array, dy: Array, weights: list[Array], **options: Any) -> Expected:
    """Return what the reference says.

    Args:
        case: the policy and the mode.
        x, dy: `[N, C, *S]`.
        weights: gamma, beta, moving mean and moving variance, `[C]`.
        options: mask `[N, *S]` and activation.
    """
    x, dy = (values.astype(np.float64) for values in (x, dy))
    gamma, beta, mean, var = (value.astype(np.float64) for value in weights)
    policy, old = shown(case.policy), reference.Running(mean, var)
    mask = options.get("mask")
    moments = reference.moments(x, mask)
    after = reference.update_running_keras(
        old, moments.mean[0], moments.var[0], moments.count[0], momentum=MOMENTUM
    )
    std: Any = np.sqrt(moments.var[0] + EPSILON)
    adapts = isinstance(policy, batchnorm.Adapted) and not case.training
    if adapts or (isinstance(policy, batchnorm.Renorm) and case.training):
        found = (
            reference.adapted(x, dy, gamma, beta, old, prior=policy.prior, eps=EPSILON, **options)
            if adapts
            else reference.renorm(x, dy, gamma, beta, old, **bounds(case), eps=EPSILON, **options)
        )
        y, (dx, dgamma, dbeta, _) = found.y, found.gradients
    else:
        by_batch = case.training and not isinstance(policy, batchnorm.Running)
        how = {"group_size": policy.group_size} if by_batch else {"mean": mean, "var": var}
        forward = reference.forward(x, gamma, beta, eps=EPSILON, **options, **how)
        y = forward.y
        dx, dgamma, dbeta, _ = reference.backward(x, dy, gamma, beta, eps=EPSILON, **options, **how)
        if policy.is_sequential:
            after = old
            for m, v, n in zip(forward.mean, forward.var, forward.count, strict=True):
                after = reference.update_running_keras(after, m, v, n, momentum=MOMENTUM)
        group = np.arange(len(x)) // (policy.group_size or len(x)) if by_batch else np.zeros(len(x), int)
        std = 1 / forward.rstd[group].reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    if not policy.moves(case.training):
        after = old
    if np.ndim(std) == 1:
        std = std.reshape(-1, *[1] * (x.ndim - 2))
    return Expected(y, dx, dgamma, dbeta, std, after.mean, after.var)


def bounds(case: Case) -> dict[str, float]:
    """r_max and d_max as far as they are open, by the policy's own words."""
    policy = shown(case.policy)
    assert isinstance(policy, batchnorm.Renorm)

    def share(steps: tuple[int, int]) -> float:
        start, end = steps
        return 1.0 if case.batches >= end else max(0.0, (case.batches - start) / (end - start))

    return {
        "r_max": 1 + (policy.r_max - 1) * share(policy.r_steps),
        "d_max": policy.d_max * share(policy.d_steps),
    }


def made_for(case: Case, channels: int, axis: int, ndim: int, offset: float = 0.0, **options: Any) -> Any:
    """A built layer with weights away from 1 and 0, and moving statistics not far from the data's."""
    layer = BatchNormalization(
        axis=axis, momentum=MOMENTUM, epsilon=EPSILON, statistics=case.policy, **options
    )
    shape: list[int | None] = [None] * ndim
    shape[axis] = channels
    layer.build(tuple(shape))
    random = np.random.default_rng(11)
    layer.gamma.assign(random.uniform(0.5, 1.5, channels) * np.resize([1.0, -1.0], channels))
    layer.beta.assign(random.normal(size=channels))
    layer.moving_mean.assign(offset + random.normal(size=channels))
    layer.moving_variance.assign(random.uniform(0.5, 2.0, channels))
    if layer.batches is not None:
        layer.batches.assign(case.batches)
    return layer


def with_masked_positions(case: Case, x: Array, dy: Array, weights: list[Array], mask: Array) -> list[Array]:
    """Return y, dx, dgamma and dbeta, where masked positions count for nothing and are normalized too.

    That is Keras's way, and not the reference's, whose masked positions are 0: torch differentiates it here,
    one group after the other.

    Args:
        case: in a mode in which it takes moments.
        x, dy: `[N, C, S]`.
        weights: gamma, beta, moving mean and moving variance, `[C]`.
        mask: `[N, S]`.
    """
    policy = shown(case.policy)
    leaves = [torch.tensor(v.astype(np.float64), requires_grad=True) for v in (x, *weights[:2])]
    inputs, gamma, beta = leaves
    moving_mean, moving_var = (torch.tensor(value.astype(np.float64)) for value in weights[2:])
    parts = []
    for part, keep in zip(
        inputs.split(policy.groups(case.training) or len(x)),
        torch.tensor(mask)[:, None].double().split(policy.groups(case.training) or len(x)),
        strict=True,
    ):
        n = keep.sum().clamp(min=1)
        mean = (part * keep).sum((0, 2)) / n
        var = ((part - mean[:, None]).square() * keep).sum((0, 2)) / n
        if isinstance(policy, batchnorm.Adapted) and not case.training:
            samples = keep.amax((1, 2)).sum()
            share = samples / (samples + policy.prior)
            mean, var = share * mean + (1 - share) * moving_mean, share * var + (1 - share) * moving_var
        z = (part - mean[:, None]) / (var + EPSILON).sqrt()[:, None]
        if isinstance(policy, batchnorm.Renorm):
            opened, std = bounds(case), (moving_var + EPSILON).sqrt()
            r = ((var + EPSILON).sqrt() / std).detach().clamp(1 / opened["r_max"], opened["r_max"])
            d = ((mean - moving_mean) / std).detach().clamp(-opened["d_max"], opened["d_max"])
            z = z * r[:, None] + d[:, None]
        parts.append(z * gamma[:, None] + beta[:, None])
    y = torch.cat(parts)
    return [v.detach().numpy() for v in (y, *torch.autograd.grad(y, leaves, torch.tensor(dy).double()))]
