"""The mini-batch's own statistics: how they normalize, differentiate, and move the running ones.

Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
"""

from __future__ import annotations

from typing import Any

# An array of any framework, `[C]` or `[G, C]`, wide; or a scalar that broadcasts against one.
Array = Any


def gradient_coefficients(
    weight: Array, rstd: Array, sum_dy: Array, sum_dy_xhat: Array, count: Array
) -> tuple[Array, Array, Array]:
    """Return a, b, c of dx = a dy' + b x̂ + c, where mean and var are functions of x.

    With n = count, Σ over the values that share a mean:

        dx = weight * rstd * (dy' - Σdy'/n - x̂ Σ(dy' x̂)/n)
        a  = weight * rstd,    b = -a Σ(dy' x̂)/n,    c = -a Σdy'/n
    """
    a = weight * rstd
    scale = a / -(count + (count == 0))
    return a, scale * sum_dy_xhat, scale * sum_dy


def running_update(running: Array, batch: Array, momentum: Array) -> Array:
    """Return the moved running statistic, in torch's convention.

        running = (1 - momentum) * running + momentum * batch

    The batch variance that enters is the unbiased one, m2 / (n - 1). A cumulative average over batches has
    momentum = 1 / (number of batches so far).
    """
    return (1 - momentum) * running + momentum * batch
