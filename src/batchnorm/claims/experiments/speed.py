"""Experiments on speed: sigmoid layers, larger learning rates, noise behind the norm."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.claims.claim import Curve, Findings, Report
from batchnorm.claims.fitting import (
    accuracy,
    batch_of,
    digits,
    first_held_out,
    fit,
    learner_of,
    made,
    small_digits,
)
from batchnorm.claims.networks import conv_net, dense_net
from batchnorm.claims.tools.noise import noise_behind_norms
from batchnorm.studies.learner_torch import evaluation
from batchnorm.studies.padding import Array

_SIGMOIDS = (784, 100, 100, 100, 10)
_SPEED_STEPS, _SPEED_RATE = 1800, 0.3
_TARGET = 0.85


def sigmoid_layers(seed: int, report: Report) -> Findings:
    """Accuracy over steps, and how far the input of the last sigmoid moves, without and with the norm."""
    data, numbers = digits(), dict[str, float]()
    x, _ = batch_of(data, 500)
    accuracies: dict[str, Curve] = {}
    inputs: dict[str, Curve] = {}
    for i, arm in enumerate(("none", "batchnorm")):
        learner = learner_of(made(dense_net(_SIGMOIDS, "sigmoid"), arm, seed), _SPEED_RATE)
        places = sorted({round(_SPEED_STEPS * (k / 20) ** 2) for k in range(1, 21)})
        found: list[tuple[float, Array]] = []
        for before, after in itertools.pairwise((0, *places)):
            fit(learner, data, steps=after - before, batch_size=60, seed=seed, first=before)
            found.append((accuracy(learner, data), _sigmoid_inputs(learner.model, x)))
            report((i + after / _SPEED_STEPS) / 2)
        found_accuracies = [value for value, _ in found]
        bands = np.stack([band for _, band in found])  # [times, 3, units]
        accuracies[arm] = Curve(places, found_accuracies)
        for row, share in enumerate((15, 50, 85)):
            inputs[f"{arm}, {share} %"] = Curve(places, [float(value) for value in bands[:, row, 0]])
        reached = [place for place, value in zip(places, found_accuracies, strict=True) if value >= _TARGET]
        numbers[f"steps, {arm}"] = float(reached[0]) if reached else float(_SPEED_STEPS)
        numbers[f"accuracy, {arm}"] = found_accuracies[-1]
        late = bands[len(bands) // 4 :]
        movement = np.std(late, axis=0).mean(0) / (late[:, 2] - late[:, 0]).mean(0)
        numbers[f"movement, {arm}"] = float(movement.mean())
    numbers["speed-up"] = numbers["steps, none"] / numbers["steps, batchnorm"]
    numbers["steadier"] = numbers["movement, none"] / numbers["movement, batchnorm"]
    return Findings(numbers, {"accuracy": accuracies, "inputs": inputs})


def _sigmoid_inputs(model: nn.Module, x: Tensor) -> Array:
    """Returns the 15th, 50th and 85th percentile of each unit's input to the last sigmoid, `[3, units]`."""
    last = [module for module in model.modules() if isinstance(module, nn.Sigmoid)][-1]
    kept: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        with evaluation(model, by_batch=True):
            model(x)
    finally:
        handle.remove()
    percentiles: Array = np.percentile(kept[0].numpy(), (15, 50, 85), axis=0)
    return percentiles


_RATE = 0.2  # the plain network's fastest in trials with other seeds, of 0.03 to 3
_CONV_STEPS = 200


def larger_rates(seed: int, report: Report) -> Findings:
    """Steps to an accuracy at one, five and thirty times a rate, with ReLU and with the sigmoid."""
    data, numbers, curves = first_held_out(small_digits(), 500), dict[str, float](), dict[str, Curve]()
    arms = [
        ("none", "relu", 1), ("batchnorm", "relu", 1), ("none", "relu", 5), ("batchnorm", "relu", 5),
        ("batchnorm", "relu", 30), ("none", "sigmoid", 5), ("batchnorm", "sigmoid", 5),
    ]  # fmt: skip
    for i, (arm, activation, times) in enumerate(arms):
        build = conv_net(14, 1, 10, activation="relu" if activation == "relu" else "sigmoid")
        learner = learner_of(made(build, arm, seed), _RATE * times)
        name = f"{arm}, {activation}, × {times}"
        places, values, finite = [0], [accuracy(learner, data)], True
        while places[-1] < _CONV_STEPS and finite:
            step = 5 if places[-1] < 50 else 25
            finite = fit(learner, data, steps=step, batch_size=32, seed=seed, first=places[-1])
            places.append(places[-1] + step)
            values.append(accuracy(learner, data) if finite else 0.1)
        curves[name] = Curve(places, values)
        numbers[f"accuracy: {name}"] = values[-1]
        reached = [place for place, value in zip(places, values, strict=True) if value >= 0.9]
        numbers[f"steps: {name}"] = float(reached[0]) if reached else float(_CONV_STEPS)
        report((i + 1) / len(arms))
    base = numbers["steps: none, relu, × 1"]
    for times in (1, 5, 30):
        numbers[f"speed-up × {times}"] = base / numbers[f"steps: batchnorm, relu, × {times}"]
    numbers["sigmoid"] = (
        numbers["accuracy: batchnorm, sigmoid, × 5"] - numbers["accuracy: none, sigmoid, × 5"]
    )
    numbers["without at × 5"] = numbers["accuracy: none, relu, × 5"]
    return Findings(numbers, {"accuracy": curves})


_NOISE_STEPS = 500


def noise_behind(seed: int, report: Report) -> Findings:
    """Accuracy and drift of the plain network, the normalized one, and that with noise behind its norms."""
    data, numbers = digits(), dict[str, float]()
    x, _ = batch_of(data, 500)
    accuracies: dict[str, Curve] = {}
    drifts: dict[str, Curve] = {}
    for i, name in enumerate(("none", "batchnorm", "batchnorm with noise")):
        model = made(dense_net(_SIGMOIDS, "sigmoid"), name.partition(" ")[0], seed)
        learner = learner_of(model, 0.1)
        noisy = noise_behind_norms(model) if "noise" in name else contextlib.nullcontext()
        places, values, drift = [], [], []
        with noisy, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for step in range(0, _NOISE_STEPS, 50):
                before = _layer_inputs(model, x)
                fit(learner, data, steps=1, batch_size=60, seed=seed, first=step)
                drift.append(_moved(before, _layer_inputs(model, x)))
                fit(learner, data, steps=49, batch_size=60, seed=seed, first=step + 1)
                places.append(step + 50)
                values.append(accuracy(learner, data))
        accuracies[name], drifts[name] = Curve(places, values), Curve(places, drift)
        numbers[f"accuracy, {name}"] = float(np.mean(values))
        numbers[f"drift, {name}"] = float(np.mean(drift))
        report((i + 1) / 3)
    noisy_drift = numbers["drift, batchnorm with noise"]
    numbers["gain with noise"] = numbers["accuracy, batchnorm with noise"] - numbers["accuracy, none"]
    numbers["lost by noise"] = numbers["accuracy, batchnorm"] - numbers["accuracy, batchnorm with noise"]
    numbers["more drift"] = noisy_drift / numbers["drift, none"]
    return Findings(numbers, {"accuracy": accuracies, "drift": drifts})


def _layer_inputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns the mean and deviation of each unit of the inputs of all sigmoids, in training."""
    found: list[Tensor] = []
    with contextlib.ExitStack() as hooks, evaluation(model, by_batch=True):
        for module in model.modules():
            if isinstance(module, nn.Sigmoid):
                handle = module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
                hooks.callback(handle.remove)
        model(x)
    return [torch.stack([values.mean(0), values.std(0)]) for values in found]


def _moved(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Returns how far means and deviations of units moved, in deviations, averaged over units and layers."""
    moves = [((b - a).abs() / a[1].clamp_min(1e-6)).mean() for a, b in zip(before, after, strict=True)]
    return float(torch.stack(moves).mean())
