"""Compares statistics at test time: running ones, and those of more and more training samples."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.models.calibrate import calibrate


def error_over_samples(
    model: nn.Module,
    x: Tensor,
    samples: Sequence[int],
    error: Callable[[nn.Module], float],
    *,
    batch_size: int = 250,
    method: Literal["batch", "layerwise"] = "batch",
) -> dict[int, float]:
    """Returns the error of a model whose running statistics are those of so many training samples.

    The model is as before: copies are calibrated.

    Args:
        model: with batch normalizations.
        x: training inputs `[N, ...]`, in random order; the first ones are taken.
        samples: how many to take, at most N.
        error: measures a model in evaluation, such as its held-out error.
        batch_size: samples of a batch.
        method: of `calibrate`.

    Example:
        >>> error_over_samples(model, x, (32, 256, 2048), lambda model: 1 - accuracy(model, x_test, y_test))

    Source: Wu & Johnson 2021, arXiv:2105.07576, section 3.
    """
    found = {}
    for size in samples:
        copied = copy.deepcopy(model)
        batches = [x[start : min(start + batch_size, size)] for start in range(0, size, batch_size)]
        calibrate(copied, batches, method=method)
        found[size] = error(copied)
    return found


def variance_shift(model: nn.Module, norms: Sequence[nn.Module], x: Tensor) -> list[float]:
    """Returns how many times larger the variance of each norm's input is in training than in evaluation.

    Of one forward of all of `x` in training, whose statistics become the running ones, and of one in
    evaluation: the mean over channels of the ratio. Without dropout it is 1. The model is as before.

    Args:
        model: with dropout.
        norms: batch normalizations of it.
        x: inputs `[N, ...]`.

    Source: Li et al. 2019, arXiv:1801.05134, section 3.
    """
    copied = copy.deepcopy(model).train()
    names = [name for wanted in norms for name, module in model.named_modules() if module is wanted]
    for module in copied.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    training = _input_variances(copied, names, x)
    evaluation = _input_variances(copied.eval(), names, x)
    return [float((a / b).mean()) for a, b in zip(training, evaluation, strict=True)]


def _input_variances(model: nn.Module, names: Sequence[str], x: Tensor) -> list[Tensor]:
    found: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = inputs[0].transpose(0, 1).flatten(1).var(1)

        return hook

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(look(name)).remove)
        model(x)
    return [found[name] for name in names]
