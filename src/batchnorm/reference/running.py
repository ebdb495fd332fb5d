"""How the running statistics move, in the two conventions that disagree.

Both are an exponential average of the batches' statistics, but torch's momentum is the weight of the new
value and Keras's that of the old one, and torch averages the unbiased variance and Keras the biased one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .groups import Array


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
        count: number of values per channel. With 0 the statistics stay; with 1 the batch's variance is 0.
        momentum: weight of the new value, 0..1; None = cumulative average.
        batches: number of batches seen, this one and empty ones included: what torch calls
            num_batches_tracked. Used for momentum=None.

    Source: torch.nn.BatchNorm2d; the unbiased variance is that of Ioffe & Szegedy 2015, arXiv:1502.03167,
    algorithm 2.
    """
    if count == 0:
        return running
    weight = 1.0 / batches if momentum is None else momentum
    var_unbiased = np.asarray(var) * (count / max(count - 1.0, 1.0))
    return Running(
        (1.0 - weight) * np.asarray(running.mean) + weight * np.asarray(mean),
        (1.0 - weight) * np.asarray(running.var) + weight * var_unbiased,
    )


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
