"""Experiments on statistics: how many samples, which batch, what leaks and what shifts."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.claims.claim import Curve, Findings, Report
from batchnorm.claims.fitting import accuracy, digits, first_held_out, fit, learner_of, made, small_digits
from batchnorm.claims.networks import conv_net, dense_net
from batchnorm.claims.tools.statistics_error import error_over_samples, variance_shift
from batchnorm.models.freeze import freeze
from batchnorm.studies.arms import parse_arm
from batchnorm.studies.data import Dataset
from batchnorm.studies.learner_torch import TorchLearner
from batchnorm.studies.padding import Array
from batchnorm.studies.settings import Recipe
from batchnorm.studies.training import evaluate

_SAMPLES = (8, 16, 32, 64, 128, 256, 512, 1024, 2500)
_EPOCHS = 6


def samples_for_statistics(seed: int, report: Report) -> Findings:
    """Error by statistics of more and more samples, and by running ones epoch by epoch, at batches of 500."""
    data = first_held_out(small_digits(), 1000)
    x = torch.from_numpy(data.x_train[np.random.RandomState(seed).permutation(len(data.x_train))])
    learner = learner_of(made(conv_net(14, 1, 10), "batchnorm", seed), 0.5)
    running, precise = [], []
    for epoch in range(_EPOCHS):
        fit(learner, data, steps=5, batch_size=500, seed=seed, first=5 * epoch)
        running.append(1 - accuracy(learner, data))
        precise.append(error_over_samples(learner.model, x, (1024,), lambda m: _error(m, data))[1024])
        report(0.6 * (epoch + 1) / _EPOCHS)
    errors = error_over_samples(learner.model, x, _SAMPLES, lambda model: _error(model, data))
    report(1.0)
    epochs = list(range(1, _EPOCHS + 1))
    numbers = {f"error, {size} samples": error for size, error in errors.items()}
    numbers["1,024 samples"] = errors[1024] - errors[2500]
    numbers["few samples"] = errors[8] - errors[2500]
    numbers["early"] = float(np.mean(running[:3]) - np.mean(precise[:3]))
    numbers["late"] = float(np.mean(running[-3:]) - np.mean(precise[-3:]))
    return Findings(
        numbers,
        {
            "samples": {"batchnorm": Curve(_SAMPLES, list(errors.values()))},
            "epochs": {"running": Curve(epochs, running), "1,024 samples": Curve(epochs, precise)},
        },
    )


def _error(model: nn.Module, data: Dataset) -> float:
    learner = TorchLearner(model, parse_arm("none"), Recipe(optimizer="sgd"), 0.1)
    return 1 - evaluate(learner, data.x_test, data.y_test)[1]


_BATCH = 128
_GHOSTS = (2, 8, 32, 128)
_GHOST_STEPS = 100


def normalization_batch(seed: int, report: Report) -> Findings:
    """Error over the batch that normalizes, by batch, running and population statistics, and frozen late."""
    data, numbers = first_held_out(small_digits(), 1000), dict[str, float]()
    found: dict[str, list[float]] = {name: [] for name in ("batch", "running", "population", "frozen late")}
    late = _GHOST_STEPS * 3 // 4
    for i, size in enumerate(_GHOSTS):
        learner = learner_of(made(conv_net(14, 1, 10), f"batchnorm:Ghost({size})", seed), 0.3)
        fit(learner, data, steps=late, batch_size=_BATCH, seed=seed)
        frozen_model = copy.deepcopy(learner.model)
        frozen, learner = learner_of(frozen_model, 0.03), learner_of(learner.model, 0.03)
        frozen.calibrate(data.x_train)
        freeze(frozen_model)
        for one in (learner, frozen):
            fit(one, data, steps=_GHOST_STEPS - late, batch_size=_BATCH, seed=seed, first=late)
        found["batch"].append(_error_by_batch(learner, data, size))
        found["running"].append(1 - accuracy(learner, data))
        found["frozen late"].append(1 - accuracy(frozen, data))
        learner.calibrate(data.x_train)
        found["population"].append(1 - accuracy(learner, data))
        report((i + 1) / len(_GHOSTS))
    for name, values in found.items():
        numbers.update({f"{name}, {size}": value for size, value in zip(_GHOSTS, values, strict=True)})
    numbers["batches of 2"] = found["population"][0] - min(found["population"])
    numbers["gain by freezing"] = found["population"][0] - found["frozen late"][0]
    numbers["gain at 128"] = found["population"][-1] - found["frozen late"][-1]
    return Findings(numbers, {"errors": {name: Curve(_GHOSTS, values) for name, values in found.items()}})


def _error_by_batch(learner: TorchLearner, data: Dataset, size: int) -> float:
    """Returns the held-out error by statistics of test batches as large as those that normalized."""
    wrong, step = 0, max(size, 250 // size * size)
    for start in range(0, len(data.x_test) // step * step, step):
        rows = np.arange(start, start + step)
        output = learner.predict(data.x_test[rows], by_batch=True)
        assert not isinstance(output, str)
        wrong += int((output.argmax(1) != data.y_test[rows]).sum())
    return wrong / (len(data.x_test) // step * step)


_CLASSES, _PER_CLASS = 10, 10
_LEAK_STEPS = 200


def ordered_batches(seed: int, report: Report) -> Findings:
    """The train–test gap where each group that normalizes is of one class, and where groups are mixed."""
    data, numbers = digits(), dict[str, float]()
    arms = {
        "ordered, by groups": ("batchnorm:Ghost(10)", True),
        "shuffled, by groups": ("batchnorm:Ghost(10)", False),
        "ordered, groups drawn at random": ("batchnorm:Ghost(10, shuffle=True)", True),
        "ordered, whole batch": ("batchnorm", True),
    }
    by_class = [np.flatnonzero(data.y_train == one) for one in range(_CLASSES)]
    for i, (name, (arm, is_ordered)) in enumerate(arms.items()):
        learner = learner_of(made(dense_net((784, 100, 100, 10)), arm, seed), 0.1)
        random = np.random.RandomState(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for _ in range(_LEAK_STEPS):
                rows = _balanced(by_class, random, is_ordered)
                learner.step(data.x_train[rows], data.y_train[rows])
            seen = [_as_trained(learner, data, _balanced(by_class, random, is_ordered)) for _ in range(10)]
        numbers[f"train: {name}"], numbers[f"test: {name}"] = float(np.mean(seen)), accuracy(learner, data)
        numbers[f"gap: {name}"] = numbers[f"train: {name}"] - numbers[f"test: {name}"]
        report((i + 1) / len(arms))
    numbers["leak"] = numbers["gap: ordered, by groups"] - numbers["gap: shuffled, by groups"]
    numbers["lost"] = numbers["test: shuffled, by groups"] - numbers["test: ordered, by groups"]
    numbers["left by the whole batch"] = (
        numbers["test: shuffled, by groups"] - numbers["test: ordered, whole batch"]
    )
    return Findings(numbers)


def _balanced(by_class: list[Array], random: np.random.RandomState, is_ordered: bool) -> Array:
    """Returns ten rows of each class, class by class or in random order."""
    rows = np.concatenate([random.choice(of_class, _PER_CLASS, replace=False) for of_class in by_class])
    return rows if is_ordered else random.permutation(rows)


def _as_trained(learner: TorchLearner, data: Dataset, rows: Array) -> float:
    """Returns the accuracy on a batch by the statistics that training takes."""
    output = learner.predict(data.x_train[rows], by_batch=True)
    assert not isinstance(output, str)
    return float((output.argmax(1) == data.y_train[rows]).mean())


_DROPOUT = 0.5
_SHIFT_STEPS = 250


class _Last(nn.Module):
    """Drops units of the last hidden layer's output: behind all norms."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body, self.head, self.dropout = body[:-1], body[-1], nn.Dropout(_DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.dropout(self.body(x)))
        return output


def dropout_before_norm(seed: int, report: Report) -> Findings:
    """Variance of norm inputs in training over that in evaluation, and accuracy, by dropout's place."""
    data, numbers = digits(), dict[str, float]()
    build = dense_net((784, 100, 100, 100, 10), dropout=_DROPOUT)
    curves = {}
    x = torch.from_numpy(data.x_train)
    for i, (name, arm) in enumerate(
        (("none", "batchnorm"), ("before", "dropout+batchnorm"), ("after all", "batchnorm"))
    ):
        model = made(build, arm, seed)
        if name == "after all":
            assert isinstance(model, nn.Sequential)
            model = _Last(model)
        learner = learner_of(model, 0.1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fit(learner, data, steps=_SHIFT_STEPS, batch_size=64, seed=seed)
            norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
            shifts = variance_shift(model, norms, x)
        curves[name] = Curve(list(range(1, len(shifts) + 1)), shifts)
        numbers[f"shift, {name}"] = float(np.exp(np.mean(np.log(shifts))))
        numbers[f"accuracy, {name}"] = accuracy(learner, data)
        report((i + 1) / 3)
    numbers["shift"] = numbers["shift, before"] / numbers["shift, after all"]
    numbers["lost"] = numbers["accuracy, after all"] - numbers["accuracy, before"]
    return Findings(numbers, {"shifts": curves})
