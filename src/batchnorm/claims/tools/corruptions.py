"""Corrupts images, and measures how a model that adapts to a test batch does on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from batchnorm.models.convert import convert
from batchnorm.statistics.adapted import Adapted

STRENGTHS = (1, 2, 3, 4, 5)


def _noise(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    return x + 0.08 * strength * torch.randn(x.shape, generator=generator)


def _blur(x: Tensor, strength: int, _: torch.Generator) -> Tensor:
    width = 0.35 * strength
    places = torch.arange(-4.0, 5.0)
    line = torch.exp(-0.5 * (places / width) ** 2)
    line = line / line.sum()
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 9, 9)
    return conv2d(pad(x, (4, 4, 4, 4), mode="replicate"), kernel, groups=x.shape[1])


def _contrast(x: Tensor, strength: int, _: torch.Generator) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (1 - 0.17 * strength) * (x - mean)


CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
}


def corrupted(x: Tensor, kind: str, strength: int, seed: int = 0) -> Tensor:
    """Returns images with noise, blur or less contrast.

    Args:
        x: images `[N, C, H, W]`, values from 0 to 1.
        kind: of `CORRUPTIONS`.
        strength: 1 to 5.
        seed: of the noise.

    Source: after Hendrycks & Dietterich 2019, arXiv:1903.12261, whose kinds these are; the strengths are
    ours.
    """
    return CORRUPTIONS[kind](x, strength, torch.Generator().manual_seed(seed))


def adapted_error(model: nn.Module, x: Tensor, y: Tensor, *, prior: float | None, batch_size: int) -> float:
    """Returns the error of a model on test batches to whose statistics it adapts.

        mean = (1 − s) running mean + s batch mean, s = n / (n + prior); the same for the variance

    The model becomes one of this library's layers with `statistics=Adapted(prior)`, in evaluation.

    Args:
        model: with batch normalizations, or without: then it does not adapt.
        x, y: test images `[N, C, H, W]` and classes `[N]`.
        prior: in samples; 0 takes the statistics of the batch alone, None does not adapt.
        batch_size: samples of a test batch.

    Returns:
        The fraction of wrong answers.

    Source: Schneider et al. 2020, arXiv:2006.16971.
    """
    if prior is not None:
        convert(model, Adapted(prior))
    model.eval()
    wrong = 0
    with torch.no_grad():
        for start in range(0, len(x), batch_size):
            images, classes = x[start : start + batch_size], y[start : start + batch_size]
            wrong += int((model(images).argmax(1) != classes).sum())
    return wrong / len(x)
