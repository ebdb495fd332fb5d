"""The arithmetic of folding: an affine map per channel, moved into a layer's kernel and bias, in float64.

A normalization at inference is y = s x + t per channel, with s = gamma / sqrt(moving_variance + epsilon) and
t = beta - s moving_mean. After a layer W x + b it scales the layer's outputs: W' = s W, b' = s b + t. Before
one it scales the inputs: W (s x + t) + b has W' = W s and b' = b + W t, where W t sums over the kernel's
window, so every value in the window must be data: no padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import keras
import numpy as np

from batchnorm.folding.affine import Affine, Array
from batchnorm.folding.affine import affine as map_of

# What a layer's last kernel looks like; a separable one has two, depthwise and pointwise.
Family = Literal["plain", "transposed", "depthwise", "separable"]
_layers = keras.layers
FAMILIES: dict[type, Family] = {
    _layers.Dense: "plain",  # [C_in, C_out]
    _layers.Conv1D: "plain",  # [*K, C_in / groups, C_out]
    _layers.Conv2D: "plain",
    _layers.Conv3D: "plain",
    _layers.Conv1DTranspose: "transposed",  # [*K, C_out, C_in]
    _layers.Conv2DTranspose: "transposed",
    _layers.Conv3DTranspose: "transposed",
    _layers.DepthwiseConv1D: "depthwise",  # [*K, C_in, M]: output channel c M + m
    _layers.DepthwiseConv2D: "depthwise",
    _layers.SeparableConv1D: "separable",
    _layers.SeparableConv2D: "separable",
}


@dataclass(frozen=True)
class Weights:
    """A layer's numbers.

    Attributes:
        kernels: as Keras shapes them; two for a separable convolution (depthwise, pointwise), one otherwise.
        bias: `[C_out]`, or `[1]` where the layer has none.
    """

    kernels: tuple[Array, ...]
    bias: Array


def affine(norm: keras.layers.BatchNormalization) -> Affine:
    """Return scale and shift of a built batch normalization at inference."""
    return map_of(
        float64(norm.moving_mean),
        float64(norm.moving_variance),
        norm.epsilon,
        float64(norm.gamma) if norm.scale else None,
        float64(norm.beta) if norm.center else None,
    )


def float64(variable: keras.Variable) -> Array:
    """Return a variable's value as a NumPy array of float64."""
    return np.asarray(keras.ops.convert_to_numpy(variable.value)).astype(np.float64)


def kernel_names(layer: keras.layers.Layer) -> tuple[str, ...]:
    """Return the names of a layer's kernel variables."""
    is_separable = FAMILIES[type(layer)] == "separable"
    return ("depthwise_kernel", "pointwise_kernel") if is_separable else ("kernel",)


def read_weights(layer: keras.layers.Layer) -> Weights:
    """Return the numbers of a built layer of one of FAMILIES."""
    kernels = tuple(float64(getattr(layer, name)) for name in kernel_names(layer))
    return Weights(kernels, float64(layer.bias) if layer.use_bias else np.zeros(1))


def scale_outputs(family: Family, weights: Weights, found: Affine) -> Weights:
    """Return the weights that give scale y + shift where these give y."""
    *others, kernel = weights.kernels
    shape = {"transposed": (-1, 1), "depthwise": kernel.shape[-2:]}.get(family, (1, -1))
    scaled = kernel * found.scale.reshape(shape)
    return Weights((*others, scaled), weights.bias * found.scale + found.shift)


def scale_inputs(family: Family, weights: Weights, found: Affine) -> Weights:
    """Return the weights that take x where these take scale x + shift; a transposed layer has none."""
    kernel, *others = weights.kernels
    if family == "plain":
        groups = len(found.scale) // kernel.shape[-2]
        blocks = kernel.reshape(-1, kernel.shape[-2], groups, kernel.shape[-1] // groups)
        scale, shift = (values.reshape(groups, -1) for values in (found.scale, found.shift))
        scaled = np.einsum("kigo,gi->kigo", blocks, scale).reshape(kernel.shape)
        return Weights((scaled,), weights.bias + np.einsum("kigo,gi->go", blocks, shift).reshape(-1))
    constant = (kernel.reshape(-1, *kernel.shape[-2:]).sum(0) * found.shift[:, None]).reshape(-1)
    for pointwise in others:  # it takes the depthwise part's constant
        constant = constant @ pointwise.reshape(len(constant), -1)
    return Weights((kernel * found.scale[:, None], *others), weights.bias + constant)
