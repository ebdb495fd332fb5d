"""Measures gradient norms and activations layer by layer, over the depth of a network."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.studies.learner_torch import statistics_kept, weight_layers


def gradients_by_depth(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, float]:
    """Returns the gradient norm of each linear and convolution layer's weight, in the order of the model.

    The model is as before: no gradient is added to its parameters', and no running statistic moves.

    Args:
        model: in the mode that it is in.
        loss: computes a loss.

    Example:
        >>> norms = gradients_by_depth(model, lambda: cross_entropy(model(x), y))
        >>> growth_per_layer(list(norms.values()))

    Source: Yang et al. 2019, arXiv:1902.08129, section 3.
    """
    layers = weight_layers(model)
    with statistics_kept(model):
        gradients = torch.autograd.grad(loss(), [layer.weight for layer in layers.values()])
    return {name: float(gradient.norm()) for name, gradient in zip(layers, gradients, strict=True)}


def growth_per_layer(norms: Sequence[float]) -> float:
    """Returns the factor by which norms grow per layer, from the last to the first.

    By least squares of logarithms.

    Args:
        norms: from the first layer to the last, all positive.
    """
    slope = np.polyfit(np.arange(len(norms)), np.log(norms), 1)[0]
    return math.exp(-slope)


def activations_by_depth(model: nn.Module, forward: Callable[[], object]) -> dict[str, float]:
    """Returns the root mean square of each linear and convolution layer's output, in the order of the model.

    Args:
        model: in the mode that it is in; its running statistics are as before.
        forward: runs it.

    Source: Bjorck et al. 2018, arXiv:1806.02375, section 3.
    """
    found: dict[str, float] = {}

    def look(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, inputs: object, output: Tensor) -> None:
            del inputs
            found[name] = float(output.detach().double().square().mean().sqrt())

        return hook

    with contextlib.ExitStack() as hooks, statistics_kept(model), torch.no_grad():
        for name, layer in weight_layers(model).items():
            hooks.callback(layer.register_forward_hook(look(name)).remove)
        forward()
    return found
