"""How the running statistics move, in the two conventions that disagree.

Both are an exponential average of the batches' statistics, but torch's momentum is the weight of the new
value and Keras's that of the old one, and torch averages the unbiased variance and Keras the biased one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .groups import Array
from .moments import Moments, merge


class Running(NamedTuple):
    """The running statistics of one layer.

    Attributes:
        mean: `[C]`.
        var: `[C]`, an average of unbiased variances in torch's convention, of biased ones in Keras's.
    """

    mean: Array
    var: Array


def update_running_torch(
    running: Running,
    mean: Array,
    var: Array,
    count: float,
    *,
    momentum: float | None = 0.1,
    batches: int = 1,
) -> Running:
    """Return the running statistics after one batch, as torch moves them.

        running = (1 - momentum) * running + momentum * batch

    with the batch's mean and var_unbiased = var * count / (count - 1): for count independent values,
    E[Σ (x - mean)²] = (count - 1) σ², as the mean has been fitted to them. With momentum=None all batches
    weigh the same: the average of k values is ((k - 1) * average of the first k - 1 + the k-th) / k, so
    momentum = 1 / k does it.

    Args:
        running: statistics before the batch, each `[C]`.
        mean: `[C]`, the batch's mean.
        var: `[C]`, the batch's biased variance.
        count: number of values per channel. With fewer than 2 the statistics stay: one value has no variance.
        momentum: weight of the new value, 0..1; None = cumulative average.
        batches: number of batches seen, this one and empty ones included: what torch calls
            num_batches_tracked. Used for momentum=None.

    Source: torch.nn.BatchNorm2d; the unbiased variance is that of Ioffe & Szegedy 2015, arXiv:1502.03167,
    algorithm 2.
    """
    if count < 2:
        return running
    weight = 1.0 / batches if momentum is None else momentum
    var_unbiased = np.asarray(var) * (count / (count - 1.0))
    return Running(
        (1.0 - weight) * np.asarray(running.mean) + weight * np.asarray(mean),
        (1.0 - weight) * np.asarray(running.var) + weight * var_unbiased,
    )


def update_running_pooled(running: Running, groups: Moments, *, momentum: float = 0.1) -> Running:
    """Return the running statistics after a batch in groups, as torch moves them by all its values together.

    The values of all groups are one set: its moments are those of the groups merged (`moments.merge`).

    Args:
        running: statistics before the batch, each `[C]`.
        groups: moments of its groups.
        momentum: weight of the new value, 0..1.
    """
    count, mean, m2 = (values[:1] for values in groups)
    pooled = Moments(count, mean, m2)
    for group in range(1, len(groups.count)):
        pooled = merge(pooled, Moments(*(values[group : group + 1] for values in groups)))
    return update_running_torch(
        running, pooled.mean[0], pooled.var[0], float(pooled.count[0]), momentum=momentum
    )


def update_running_sequential(running: Running, groups: Moments, *, momentum: float = 0.1) -> Running:
    """Return the running statistics after a batch whose groups move them one after the other, as batches.

    With R for the running statistics, B for a group's own and α for momentum:

        R_g = (1 - α) R_(g-1) + α B_g        R_G = (1 - α)^G R_0 + Σ_g α (1 - α)^(G-g) B_g

    A group of fewer than two values is passed over, in the products too.

    Args:
        running: statistics before the batch, each `[C]`.
        groups: moments of its groups.
        momentum: weight of each group's value, 0..1.

    Source: Hoffer et al. 2017, arXiv:1705.08741, algorithm 1.
    """
    for count, mean, var in zip(groups.count, groups.mean, groups.var, strict=True):
        running = update_running_torch(running, mean, var, float(count), momentum=momentum)
    return running


def update_running_keras(
    running: Running,
    mean: Array,
    var: Array,
    count: float,
    *,
    momentum: float = 0.99,
) -> Running:
    """Return the moving statistics after one batch, as Keras moves them.

        moving = moving * momentum + batch * (1 - momentum)

    with the batch's mean and its biased variance.

    Args:
        running: statistics before the batch, each `[C]`.
        mean: `[C]`, the batch's mean.
        var: `[C]`, the batch's biased variance.
        count: number of values per channel. With 0 the statistics stay.
        momentum: weight of the old value, 0..1.

    Source: keras.layers.BatchNormalization.
    """
    if count == 0:
        return running
    return Running(
        np.asarray(running.mean) * momentum + np.asarray(mean) * (1.0 - momentum),
        np.asarray(running.var) * momentum + np.asarray(var) * (1.0 - momentum),
    )
