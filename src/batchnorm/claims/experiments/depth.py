"""Experiments on depth: gradients at initialization, and residual branches."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from batchnorm.claims.claim import Curve, Findings, Report
from batchnorm.claims.fitting import accuracy, batch_of, digits, fit, learner_of, made, train_accuracy
from batchnorm.claims.networks import Residual, dense_net, residual_net
from batchnorm.claims.tools.gradients_by_depth import gradients_by_depth, growth_per_layer

PREDICTED_GROWTH = math.sqrt(math.pi / (math.pi - 1))
_DEPTH, _WIDTH = 50, 512
_BY_CHANCE = 0.1


def exploding_gradients(seed: int, report: Report) -> Findings:
    """Gradient norms at initialization over 50 ReLU layers, and training accuracy at depths 10 and 60."""
    x, y = batch_of(digits(), 256, seed)
    curves = {}
    numbers = {}
    for arm in ("batchnorm",):
        model = made(dense_net((784, *[_WIDTH] * _DEPTH, 10)), arm, seed)
        # The first and the last layer have another shape than the others.
        norms = list(gradients_by_depth(model, lambda model=model: cross_entropy(model(x), y)).values())[1:-1]  # type: ignore[misc]
        numbers[f"growth, {arm}"] = growth_per_layer(norms)
        curves[arm] = Curve(list(range(2, _DEPTH + 1)), [norm / norms[-1] for norm in norms])
    report(0.2)
    rates = (0.01, 0.1)
    for depth in (10, 60):
        found = []
        for rate in rates:
            learner = learner_of(made(dense_net((784, *[128] * depth, 10)), "batchnorm", seed), rate)
            finite = fit(learner, digits(), steps=100, batch_size=64, seed=seed)
            found.append(train_accuracy(learner, digits()) if finite else _BY_CHANCE)
        numbers[f"accuracy at depth {depth}"] = max(found)
        report(0.4 if depth == 10 else 1.0)
    numbers["lost"] = numbers["accuracy at depth 10"] - numbers["accuracy at depth 60"]
    return Findings(numbers, {"gradients": curves})


_DEPTHS = (4, 8, 16, 32, 64, 128)
_TRAINED_DEPTH = 32


def residual_branches(seed: int, report: Report) -> Findings:
    """Standard deviation of residual branches over that of the skip connection, and accuracy at depth 32."""
    data = digits()
    x, _ = batch_of(data, 256, seed)
    curves, numbers = {}, {}
    for arm in ("batchnorm", "none"):
        ratios = []
        for depth in _DEPTHS:
            model = made(residual_net(784, depth, 10), arm, seed)
            blocks = [module for module in model.modules() if isinstance(module, Residual)]
            blocks[-1].is_watched = True
            with torch.no_grad():
                model(x)
            ratios.append(math.sqrt(blocks[-1].branch / blocks[-1].skip))
        curves[arm] = Curve(_DEPTHS, ratios)
        numbers[f"exponent, {arm}"] = float(np.polyfit(np.log(_DEPTHS), np.log(ratios), 1)[0])
    rates = (0.01, 0.1)
    for i, (arm, name) in enumerate((("none", "none"), ("batchnorm", "batchnorm"), ("skipinit", "skipinit"))):
        found = []
        for rate in rates:
            learner = learner_of(made(residual_net(784, _TRAINED_DEPTH, 10), arm, seed), rate)
            finite = fit(learner, data, steps=120, batch_size=64, seed=seed)
            found.append(accuracy(learner, data) if finite else _BY_CHANCE)
        numbers[name] = max(found)
        report((i + 1) / 3)
    numbers["gain"] = numbers["batchnorm"] - numbers["none"]
    numbers["less than skipinit"] = numbers["skipinit"] - numbers["batchnorm"]
    return Findings(numbers, {"branches": curves})
