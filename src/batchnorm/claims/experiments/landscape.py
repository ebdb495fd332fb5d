"""Experiments on the loss: along its gradient, and over learning rates."""

from __future__ import annotations

import math

import numpy as np
from torch.nn.functional import cross_entropy

from batchnorm.claims.claim import Curve, Findings, Report
from batchnorm.claims.fitting import accuracy, batch_of, digits, fit, learner_of, made, small_digits
from batchnorm.claims.networks import conv_net, dense_net
from batchnorm.claims.tools.gradient_line import along_gradient
from batchnorm.claims.tools.gradients_by_depth import activations_by_depth

_LENGTHS = tuple(0.1 * factor for factor in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0))
_STEPS, _EVERY = 160, 20


def along_the_gradient(seed: int, report: Report) -> Findings:
    """Range of losses, movement of the gradient and smoothness along the gradient, over training."""
    data, numbers = small_digits(), dict[str, float]()
    x, y = batch_of(data, 128, seed)
    spreads: dict[str, Curve] = {}
    smooth: dict[str, Curve] = {}
    for i, arm in enumerate(("none", "batchnorm")):
        learner = learner_of(made(conv_net(14, 1, 10, filters=(8, 16, 16)), arm, seed), 0.1)
        model, lines = learner.model, []
        places = list(range(0, _STEPS, _EVERY))
        for step in places:
            lines.append(along_gradient(model, lambda model=model: cross_entropy(model(x), y), _LENGTHS))  # type: ignore[misc]
            fit(learner, data, steps=_EVERY, batch_size=64, seed=seed, first=step)
            report((i + step / _STEPS) / 2)
        spreads[arm] = Curve(places, [line.spread for line in lines])
        spreads[f"{arm}, largest loss"] = Curve(places, [max(line.losses) for line in lines])
        smooth[arm] = Curve(places, [line.smoothness for line in lines])
        for name, values in (
            ("loss", [line.spread for line in lines]),
            ("gradient", [max(line.distances) for line in lines]),
            ("smoothness", [line.smoothness for line in lines]),
        ):
            numbers[f"{name}, {arm}"] = math.exp(float(np.mean(np.log(values))))
    for name in ("loss", "gradient", "smoothness"):
        numbers[name] = numbers[f"{name}, none"] / numbers[f"{name}, batchnorm"]
    return Findings(numbers, {"spread": spreads, "smoothness": smooth})


_RATES = (0.01, 0.1, 0.3, 1.0)
_SWEEP_STEPS = 300
_SIZES = (784, *[64] * 10, 10)
_DIVERGING_RATE, _MOST_STEPS, _SHOWN_STEPS = 1.0, 200, 12


def rate_sweep(seed: int, report: Report) -> Findings:
    """Held-out accuracy over learning rates, and activations by layer on the way to divergence."""
    data, numbers = digits(), dict[str, float]()
    curves: dict[str, Curve] = {}
    for i, arm in enumerate(("none", "batchnorm")):
        values = []
        for rate in _RATES:
            learner = learner_of(made(dense_net(_SIZES), arm, seed), rate)
            finite = fit(learner, data, steps=_SWEEP_STEPS, batch_size=64, seed=seed)
            values.append(accuracy(learner, data) if finite else 0.0)
            report(0.9 * (i + len(values) / len(_RATES)) / 2)
        curves[arm] = Curve(_RATES, values)
        works = [rate for rate, value in zip(_RATES, values, strict=True) if value >= 0.85]
        numbers[f"largest rate, {arm}"] = max(works, default=_RATES[0])
        numbers[f"best accuracy, {arm}"] = max(values)
        numbers[f"at rate 0.01, {arm}"] = values[0]
    numbers["at rate 0.01"] = numbers["at rate 0.01, batchnorm"] - numbers["at rate 0.01, none"]
    numbers["larger rates"] = numbers["largest rate, batchnorm"] / numbers["largest rate, none"]
    plain = _activations("none", seed)
    normalized = _activations("batchnorm", seed, len(plain))
    report(1.0)
    numbers["steps to divergence"] = float(len(plain))
    numbers["growth over depth, none"] = plain[-1][-2] / plain[-1][0]
    numbers["growth over depth, batchnorm"] = normalized[-1][-2] / normalized[-1][0]
    numbers["explosion"] = numbers["growth over depth, none"] / numbers["growth over depth, batchnorm"]
    rows = [[math.log10(value) for value in row] for row in plain[-_SHOWN_STEPS:]]
    rows = [[math.nan] * len(rows[0])] * (_SHOWN_STEPS - len(rows)) + rows
    return Findings(
        numbers, {"rates": curves}, {"activations": [list(row) for row in zip(*rows, strict=True)]}
    )


def _activations(arm: str, seed: int, most: int = _MOST_STEPS) -> list[list[float]]:
    """Returns the layers' activations before each step at a rate that is too large without a norm.

    It ends with the last step whose loss and activations are finite.
    """
    data = digits()
    x, _ = batch_of(data, 128, seed)
    learner = learner_of(made(dense_net(_SIZES), arm, seed), _DIVERGING_RATE)
    rows: list[list[float]] = []
    for step in range(most):
        row = list(activations_by_depth(learner.model, lambda: learner.model(x)).values())
        if not np.all(np.isfinite(row)) or min(row) <= 0:
            break
        rows.append(row)
        if not fit(learner, data, steps=1, batch_size=64, seed=seed, first=step):
            break
    return rows
