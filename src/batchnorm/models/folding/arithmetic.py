"""The arithmetic of folding: a scale and a shift per channel, moved into weights, in float64.

After a layer W x + b, scale y + shift has the weights scale W and scale b + shift. Before one,
W (scale x + shift) + b has W scale and b + W shift, where W shift sums over the whole window: every value in
it must be data.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .affine import Affine
from .foldable_layers import Absorber, Weights


def scale_outputs(weights: Weights, kind: Absorber, groups: int, found: Affine) -> Weights:
    """Return the weights that give scale y + shift where these give y."""
    weight, scale = weights.weight, found.scale
    if kind.family == "transposed":  # [C_in, C_out / groups, *K]: group g of inputs makes group g of outputs
        blocks = weight.view(groups, -1, *weight.shape[1:])
        factors = scale.view(groups, 1, -1, *[1] * kind.axes)
        scaled = (blocks * factors).flatten(0, 1)
    else:  # [C_out, C_in / groups, *K]
        scaled = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    return Weights(scaled, weights.bias * scale + found.shift)


def scale_inputs(weights: Weights, kind: Absorber, groups: int, found: Affine) -> Weights:
    """Return the weights that take x where these take scale x + shift."""
    weight = weights.weight
    if kind.family == "transposed":  # [C_in, ...]; the shift is zero: each output sees another sum of W
        scaled = weight * found.scale.view(-1, *[1] * (weight.dim() - 1))
        return Weights(scaled, weights.bias)
    blocks = weight.view(groups, -1, *weight.shape[1:])  # [groups, C_out / groups, C_in / groups, *K]
    ones = [1] * kind.axes
    scaled = (blocks * found.scale.view(groups, 1, -1, *ones)).flatten(0, 1)
    constant = (blocks * found.shift.view(groups, 1, -1, *ones)).flatten(2).sum(2).flatten()
    return Weights(scaled, weights.bias + constant)


def why_not_inputs(module: Any, kind: Absorber, shift: Tensor) -> str:
    """Return why a layer cannot take a map of its inputs; "" if it can."""
    if kind.family == "linear" or not bool(shift.any()):
        return ""
    if kind.family == "transposed":
        return "is a transposed convolution, in which the shift would not be the same everywhere"
    if module.padding_mode != "zeros" or module.padding == "valid":
        return ""  # other paddings repeat data, which has gone through the norm
    is_one = max(module.kernel_size) == 1
    pads = not is_one if module.padding == "same" else any(module.padding)
    return f"pads with zeros that the norm has not shifted (padding={module.padding!r})" if pads else ""
