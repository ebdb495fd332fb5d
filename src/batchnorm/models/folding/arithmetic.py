"""The arithmetic of folding: a scale and a shift per channel, moved into weights, in float64.

After a layer W x + b, scale y + shift has the weights scale W and scale b + shift. Before one,
W (scale x + shift) + b has W scale and b + W shift, where W shift sums over the whole window: every value in
it must be data. Beside one, W x + b + scale x + shift has W + scale I, I being 1 in the middle of the window.
Two beside each other, V x + c + W x + b, have W + V, the smaller window within the larger.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from batchnorm.folding.affine import Affine, Array

from .foldable_layers import Weights


def scale_outputs(weights: Weights, layer: nn.Module, found: Affine) -> Weights:
    """Return the weights that give scale y + shift where these give y."""
    scaled = _times(weights.weight, layer, found.scale, 2 if is_transposed(layer) else 1)
    scale, shift = torch.from_numpy(found.scale), torch.from_numpy(found.shift)
    return Weights(scaled.flatten(0, 1), weights.bias * scale + shift)


def scale_inputs(weights: Weights, layer: nn.Module, found: Affine) -> Weights:
    """Return the weights that take x where these take scale x + shift."""
    if is_transposed(layer):  # the shift is zero: each output sees another sum of W
        return Weights(_times(weights.weight, layer, found.scale, 1).flatten(0, 1), weights.bias)
    scaled = _times(weights.weight, layer, found.scale, 2).flatten(0, 1)
    constant = _times(weights.weight, layer, found.shift, 2).flatten(2).sum(2).flatten()
    return Weights(scaled, weights.bias + constant)


def add_beside(weights: Weights, layer: nn.Module, found: Affine, sign: int) -> Weights:
    """Return the weights that give y + sign (scale x + shift) where these give y of x."""
    assert isinstance(layer, _ConvNd)
    size = layer.in_channels // layer.groups
    outputs = torch.arange(layer.out_channels)
    middle = [(size - 1) // 2 for size in layer.kernel_size]
    weight = weights.weight.clone()
    weight[(outputs, outputs % size, *map(torch.tensor, middle))] += sign * torch.from_numpy(found.scale)
    return Weights(weight, weights.bias + sign * torch.from_numpy(found.shift))


def why_not_identity(module: nn.Module) -> str:
    """Return why a convolution cannot give its own input; "" if weights exist with which it does."""
    assert isinstance(module, _ConvNd)
    if module.in_channels != module.out_channels or max(module.stride) > 1:
        return "has other channels or a stride, so that it never gives its input"
    sizes = zip(module.kernel_size, module.dilation, padding_of(module), strict=True)
    if any(size % 2 == 0 or 2 * pad != step * (size - 1) for size, step, pad in sizes):
        return f"has no middle on its input (kernel_size={module.kernel_size}, padding={module.padding!r})"
    return ""


def padding_of(module: _ConvNd) -> list[float]:
    """Return how many positions a convolution adds at each end of an axis; halves where the ends differ."""
    if module.padding == "same":
        sizes = zip(module.kernel_size, module.dilation, strict=True)
        return [step * (size - 1) / 2 for size, step in sizes]
    return (
        [0.0] * len(module.kernel_size)
        if isinstance(module.padding, str)
        else list(map(float, module.padding))
    )


def place_within(module: nn.Module, other: nn.Module) -> list[int] | None:
    """Return where the window of a convolution begins in that of another, on each axis.

    None unless the second one can be both: it has the same channels, groups and strides, and each value of
    the smaller window is one of the larger, in the middle, so that both give the same positions.
    """
    assert isinstance(module, _ConvNd)
    assert isinstance(other, _ConvNd)
    names = ("in_channels", "out_channels", "groups", "stride")
    if any(getattr(module, name) != getattr(other, name) for name in names):
        return None
    pads = padding_of(module)
    if module.padding_mode != other.padding_mode and any(pads):
        return None
    places = []
    for axis, (size, larger) in enumerate(zip(module.kernel_size, other.kernel_size, strict=True)):
        step = other.dilation[axis]
        is_single = size == 1 or module.dilation[axis] == step
        more = larger - size
        if more < 0 or more % 2 or not is_single or padding_of(other)[axis] - pads[axis] != more // 2 * step:
            return None
        places.append(more // 2)
    return places


def add_window(weights: Weights, added: Weights, place: list[int], sign: int) -> Weights:
    """Return the weights of a convolution that gives y + sign v, where these give y and the added ones v."""
    weight = weights.weight.clone()
    sizes = added.weight.shape[2:]
    window = tuple(slice(start, start + size) for start, size in zip(place, sizes, strict=True))
    weight[(slice(None), slice(None), *window)] += sign * added.weight
    return Weights(weight, weights.bias + sign * added.bias)


def _times(weight: Tensor, layer: nn.Module, values: Array, axis: int) -> Tensor:
    """Return `[groups, C / groups, *]` of a weight `[C, *]`, times a value for each channel on an axis.

    Of a weight `[C_out, C_in / groups, *K]`, outputs are on axis 1 and inputs on axis 2; of a transposed one,
    `[C_in, C_out / groups, *K]`, the other way around.
    """
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    blocks = weight.view(groups, -1, *weight.shape[1:])
    shape = [groups, *[1] * (blocks.dim() - 1)]
    shape[axis] = -1
    return blocks * torch.from_numpy(values).view(shape)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer is a transposed convolution."""
    return isinstance(layer, _ConvNd) and layer.transposed


def why_not_inputs(module: nn.Module, shift: Array) -> str:
    """Return why a layer cannot take a map of its inputs; "" if it can."""
    if not isinstance(module, _ConvNd) or not shift.any():
        return ""
    if module.transposed:
        return "is a transposed convolution, in which the shift would not be the same everywhere"
    if module.padding_mode != "zeros" or module.padding == "valid":
        return ""  # other paddings repeat data, which has gone through the norm
    is_one = max(module.kernel_size) == 1
    pads = not is_one if module.padding == "same" else any(module.padding)
    return f"pads with zeros that the norm has not shifted (padding={module.padding!r})" if pads else ""
