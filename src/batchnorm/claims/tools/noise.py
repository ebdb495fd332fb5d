"""Puts noise behind the batch normalizations of a model, so that the next layer's input is unsteady."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def noise_behind_norms(model: nn.Module, shift: float = 0.5, scale: float = 1.25) -> Iterator[None]:
    """Shifts and scales every batch normalization's output at random in training, within this context.

        y[n, c] := (s_c + 0.1 a_nc) y[n, c] + m_c + 0.1 b_nc        a, b: normal

    In every call each channel draws its mean m_c uniformly from −shift to shift, and its scale s_c from
    1 / scale to scale, by torch's generator: the moments of what the next layer receives jump from step to
    step,
    which batch normalization was to prevent. Samples vary around them. Evaluation is without noise.

    Args:
        model: with batch normalizations of this library or of torch.
        shift: largest mean, in standard deviations of the norm's output (weight 1, bias 0).
        scale: largest factor of that standard deviation, 1 or more.

    Example:
        >>> with noise_behind_norms(model):
        ...     train(model)

    Differs from the paper: means and scales are drawn once for each channel and step, within ranges of the
    paper's size; the spread of samples is a tenth.

    Source: Santurkar et al. 2018, arXiv:1805.11604, section 2.1 and appendix A.
    """
    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                hooks.callback(module.register_forward_hook(_noise(shift, scale)).remove)
        yield


def _noise(shift: float, scale: float) -> Callable[[nn.Module, object, Tensor], Tensor]:
    def hook(norm: nn.Module, inputs: object, y: Tensor) -> Tensor:
        del inputs
        if not norm.training:
            return y
        channels = (1, y.shape[1], *[1] * (y.ndim - 2))
        samples = (y.shape[0], *channels[1:])
        mean = shift * (2 * torch.rand(channels) - 1) + 0.1 * torch.randn(samples)
        factor = 1 / scale + (scale - 1 / scale) * torch.rand(channels) + 0.1 * torch.randn(samples)
        return factor * y + mean

    return hook
