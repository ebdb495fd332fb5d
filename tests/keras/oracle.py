"""The formula of Keras's layer in float64, written independently; torch differentiates it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .gradients import Array, Results


class Layer(NamedTuple):
    """A layer's numbers, `[C]`, and how it computes.

    Attributes:
        gamma, beta: None where the layer has none.
        epsilon: added to var.
        activation: of torch.
        r, d: batch renormalization's; 1 and 0 without.
    """

    gamma: Array | None
    beta: Array | None
    epsilon: float
    activation: Any = None
    r: Any = 1.0
    d: Any = 0.0


def oracle(
    layer: Layer, x: Array, dy: Array, axis: int, counts: NDArray[np.bool_] | None = None
) -> tuple[Results, Array, Array]:
    """Return the results, and the mean and biased variance of the batch, `[C]`.

    Args:
        layer: its numbers.
        x: input; what does not count may be anything finite, and is normalized with the rest.
        dy: cotangent.
        axis: the channel axis.
        counts: of the shape of x, which values are in the statistics; None = all.
    """

    def leaf(values: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(values, dtype=np.float64), requires_grad=True)

    shape = [1] * x.ndim
    shape[axis] = -1
    inputs = leaf(x)
    gamma = leaf(np.ones(x.shape[axis]) if layer.gamma is None else layer.gamma)
    beta = leaf(np.zeros(x.shape[axis]) if layer.beta is None else layer.beta)
    keep = torch.tensor(np.ones(x.shape) if counts is None else counts, dtype=torch.float64)
    dims = [dim for dim in range(x.ndim) if dim != axis % x.ndim]
    n = keep.sum(dims, keepdim=True).clamp(min=1)
    mean = (inputs * keep).sum(dims, keepdim=True) / n
    var = ((inputs - mean) ** 2 * keep).sum(dims, keepdim=True) / n
    r, d = (
        torch.as_tensor(v, dtype=torch.float64).reshape(shape if np.ndim(v) else [])
        for v in (layer.r, layer.d)
    )
    xhat = (inputs - mean) / torch.sqrt(var + layer.epsilon) * r + d
    y = xhat * gamma.reshape(shape) + beta.reshape(shape)
    if layer.activation is not None:
        y = layer.activation(y)
    dx, dgamma, dbeta = torch.autograd.grad(y, [inputs, gamma, beta], torch.tensor(dy, dtype=torch.float64))
    return (
        Results(
            y.detach().numpy(),
            dx.numpy(),
            None if layer.gamma is None else dgamma.numpy(),
            None if layer.beta is None else dbeta.numpy(),
        ),
        mean.detach().reshape(-1).numpy(),
        var.detach().reshape(-1).numpy(),
    )
