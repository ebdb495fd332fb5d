"""The arithmetic of folding: an affine map per channel, moved into a layer's kernel and bias, in float64.

A normalization at inference is y = s x + t per channel, with s = gamma / sqrt(moving_variance + epsilon) and
t = beta - s moving_mean. After a layer W x + b it scales the layer's outputs: W' = s W, b' = s b + t. Before
one it scales the inputs: W (s x + t) + b has W' = W s and b' = b + W t, where W t sums over the kernel's
window, so every value in the window must be data: no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Weights:
    """A layer's numbers.

    Attributes:
        kernels: as Keras shapes them; two for a separable convolution (depthwise, pointwise), one otherwise.
        bias: `[C_out]`.
    """

    kernels: tuple[Array, ...]
    bias: Array


@dataclass(frozen=True)
class Kind:
    """How one kind of layer takes an affine map.

    Attributes:
        kernels: names of the layer's kernel variables.
        outputs: number of output channels, from the kernels' shapes.
        scale_outputs: (weights, s, t) -> weights of s y + t.
        scale_inputs: (weights, s, t) -> weights that take x where the old ones took s x + t; None where no
            weights do so exactly.
    """

    kernels: tuple[str, ...]
    outputs: Callable[[tuple[Any, ...]], int]
    scale_outputs: Callable[[Weights, Array, Array], Weights]
    scale_inputs: Callable[[Weights, Array, Array], Weights] | None


def affine(norm: Any) -> tuple[Array, Array]:
    """Return s and t, `[C]`, of a built batch normalization at inference."""
    var = float64(norm.moving_variance)
    with np.errstate(invalid="ignore", divide="ignore"):  # whoever reads this refuses NaN and inf
        scale = 1 / np.sqrt(var + norm.epsilon)
    if norm.scale:
        scale = scale * float64(norm.gamma)
    shift = -float64(norm.moving_mean) * scale
    if norm.center:
        shift = shift + float64(norm.beta)
    return scale, shift


def float64(variable: Any) -> Array:
    """Return a variable's value as a NumPy array of float64."""
    return np.asarray(keras.ops.convert_to_numpy(variable.value)).astype(np.float64)


def _outputs_last(weights: Weights, scale: Array, shift: Array) -> Weights:
    """Dense and convolutions `[*K, C_in / groups, C_out]`; of a separable one, its pointwise kernel."""
    *before, last = weights.kernels
    return Weights((*before, last * scale), weights.bias * scale + shift)


def _outputs_transposed(weights: Weights, scale: Array, shift: Array) -> Weights:
    """Transposed convolutions, `[*K, C_out, C_in]`."""
    return Weights((weights.kernels[0] * scale[:, None],), weights.bias * scale + shift)


def _outputs_depthwise(weights: Weights, scale: Array, shift: Array) -> Weights:
    """Depthwise convolutions `[*K, C_in, M]`: output channel c M + m."""
    kernel = weights.kernels[0]
    return Weights((kernel * scale.reshape(kernel.shape[-2:]),), weights.bias * scale + shift)


def _inputs_grouped(weights: Weights, scale: Array, shift: Array) -> Weights:
    """Dense and convolutions: output block g of `groups` reads input block g."""
    kernel = weights.kernels[0]
    *_, per_group, outputs = kernel.shape
    groups = len(scale) // per_group
    blocks = kernel.reshape(-1, per_group, groups, outputs // groups)
    s, t = (values.reshape(groups, per_group) for values in (scale, shift))
    scaled = np.einsum("kigo,gi->kigo", blocks, s).reshape(kernel.shape)
    return Weights((scaled,), weights.bias + np.einsum("kigo,gi->go", blocks, t).reshape(-1))


def _inputs_depthwise(weights: Weights, scale: Array, shift: Array) -> Weights:
    kernel = weights.kernels[0]
    constant = kernel.reshape(-1, *kernel.shape[-2:]).sum(0) * shift[:, None]
    return Weights((kernel * scale[:, None],), weights.bias + constant.reshape(-1))


def _inputs_separable(weights: Weights, scale: Array, shift: Array) -> Weights:
    """The depthwise part takes the map; its constant goes through the pointwise part."""
    depthwise, pointwise = weights.kernels
    channels = int(np.prod(depthwise.shape[-2:]))
    first = _inputs_depthwise(Weights((depthwise,), np.zeros(channels)), scale, shift)
    constant = first.bias @ pointwise.reshape(channels, -1)
    return replace(weights, kernels=(first.kernels[0], pointwise), bias=weights.bias + constant)


def _last(shapes: tuple[Any, ...]) -> int:
    return int(shapes[-1][-1])


_PLAIN = Kind(("kernel",), _last, _outputs_last, _inputs_grouped)
_TRANSPOSED = Kind(("kernel",), lambda shapes: int(shapes[0][-2]), _outputs_transposed, None)
_DEPTHWISE = Kind(
    ("kernel",), lambda shapes: int(np.prod(shapes[0][-2:])), _outputs_depthwise, _inputs_depthwise
)
_SEPARABLE = Kind(("depthwise_kernel", "pointwise_kernel"), _last, _outputs_last, _inputs_separable)

_layers = keras.layers
KINDS: dict[type, Kind] = {
    _layers.Dense: _PLAIN,
    _layers.Conv1D: _PLAIN,
    _layers.Conv2D: _PLAIN,
    _layers.Conv3D: _PLAIN,
    _layers.Conv1DTranspose: _TRANSPOSED,
    _layers.Conv2DTranspose: _TRANSPOSED,
    _layers.Conv3DTranspose: _TRANSPOSED,
    _layers.DepthwiseConv1D: _DEPTHWISE,
    _layers.DepthwiseConv2D: _DEPTHWISE,
    _layers.SeparableConv1D: _SEPARABLE,
    _layers.SeparableConv2D: _SEPARABLE,
}


def read_weights(layer: Any) -> Weights:
    """Return the numbers of a built layer of one of KINDS; without a bias of its own, zeros."""
    kind = KINDS[type(layer)]
    kernels = tuple(float64(getattr(layer, name)) for name in kind.kernels)
    outputs = kind.outputs(tuple(kernel.shape for kernel in kernels))
    return Weights(kernels, float64(layer.bias) if layer.use_bias else np.zeros(outputs))
