"""Experiments on regularization: large batches, decay of γ and of weights, dropout and the norm's place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm.claims.claim import Curve, Findings, Report
from batchnorm.claims.fitting import accuracy, digits, fit, icons, learner_of, made, small_digits
from batchnorm.claims.networks import conv_net, dense_net
from batchnorm.studies.data import Dataset
from batchnorm.studies.learner_torch import evaluation
from batchnorm.studies.padding import Array
from batchnorm.studies.training import evaluate
from batchnorm.torch.layers import BatchNorm1d

_SMALL, _LARGE = 32, 1250
_EPOCHS = 4
_RATE = 0.1


def large_batches(seed: int, report: Report) -> Findings:
    """Accuracy with small and large batches, at equal epochs and at equal steps, with ghost batches of 32."""
    data = digits()
    small_steps, large_steps = (_EPOCHS * (len(data.x_train) // size) for size in (_SMALL, _LARGE))
    scaled = _RATE * math.sqrt(_LARGE / _SMALL)
    arms = {
        "small": ("batchnorm", _SMALL, small_steps, _RATE),
        "large": ("batchnorm", _LARGE, large_steps, _RATE),
        "large, rate": ("batchnorm", _LARGE, large_steps, scaled),
        "large, rate, ghost": ("batchnorm:Ghost(32)", _LARGE, large_steps, scaled),
        "large, rate, ghost, steps": ("batchnorm:Ghost(32)", _LARGE, small_steps, scaled),
    }
    numbers = {}
    for i, (name, (arm, size, steps, rate)) in enumerate(arms.items()):
        learner = learner_of(made(dense_net((784, 100, 100, 10)), arm, seed), rate)
        fit(learner, data, steps=steps, batch_size=size, seed=seed)
        learner.calibrate(data.x_train)  # few steps leave running statistics behind: the gap is not theirs
        numbers[name] = accuracy(learner, data)
        report((i + 1) / len(arms))
    numbers["gap"] = numbers["small"] - numbers["large"]
    numbers["closed by ghost batches"] = numbers["large, rate, ghost"] - numbers["large, rate"]
    numbers["left by equal steps"] = numbers["small"] - numbers["large, rate, ghost, steps"]
    return Findings(numbers)


_NORM_BATCHES = (8, 32, 128)
_POPULATION = 512  # samples, of which 128 are in the loss
_DECAY_OF_8 = 6e-3  # found with other seeds: where γ's decay replaces the noise of batches of 8
_GAMMA_STEPS, _GAMMA_RATE = 200, 0.3


def gamma_decay(seed: int, report: Report) -> Findings:
    """Gap of the loss over the batch that normalizes, and with population statistics and decay of γ.

    The gradient is of batches of 128 in all arms. Population statistics are those of 512 samples, through
    which
    gradients flow. The decay that stands for a batch falls with its size, as the paper has it.
    """
    numbers = dict[str, float]()
    decays = [0.0, *(_DECAY_OF_8 * _NORM_BATCHES[0] / size for size in _NORM_BATCHES)]
    by_batch, by_decay = [], []
    for i, size in enumerate(_NORM_BATCHES):
        by_batch.append(_loss_gap(f"batchnorm:Ghost({size})", seed, 0.0, 128))
        numbers[f"batches of {size}"] = by_batch[-1]
        report(0.2 * (i + 1) / len(_NORM_BATCHES))
    for i, decay in enumerate(decays):
        by_decay.append(_loss_gap("batchnorm", seed, decay, _POPULATION))
        report(0.2 + 0.8 * (i + 1) / len(decays))
    plain, *replaced = by_decay
    numbers["population"] = plain
    numbers.update({f"decay for {size}": gap for size, gap in zip(_NORM_BATCHES, replaced, strict=True)})
    numbers["regularizes"] = plain - by_batch[0]
    numbers["falls with the batch"] = by_batch[-1] - by_batch[0]
    left = [abs(gap - other) for gap, other in zip(replaced, by_batch, strict=True)]
    differences = [abs(plain - other) for other in by_batch]
    numbers["left by decay"] = float(np.mean(left))
    numbers["replaced"] = float(np.mean(differences) / max(np.mean(left), 1e-6))  # type: ignore[operator]
    curves = {
        "batchnorm": Curve(_NORM_BATCHES, by_batch),
        "population, decay of γ": Curve(_NORM_BATCHES, replaced),
        "population": Curve((_NORM_BATCHES[0], _NORM_BATCHES[-1]), (plain, plain)),
    }
    return Findings(numbers, {"gaps": curves})


def _loss_gap(arm: str, seed: int, decay: float, samples: int) -> float:
    """Trains by SGD with statistics of so many samples; returns held-out less training loss, calibrated."""
    data = small_digits()
    learner = learner_of(made(dense_net((196, 128, 10)), arm, seed), _GAMMA_RATE)
    model = learner.model
    gammas = [module.weight for module in model.modules() if isinstance(module, BatchNorm1d)]
    optimizer = torch.optim.SGD(model.parameters(), _GAMMA_RATE)
    x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
    for step in range(_GAMMA_STEPS):
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(1_000_003 * seed + step))
        optimizer.zero_grad()
        cross_entropy(model(x[rows[:samples]])[:128], y[rows[:128]]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for gamma in gammas:
                gamma.mul_(1 - _GAMMA_RATE * decay)
    learner.calibrate(data.x_train)
    losses = [
        evaluate(learner, *part)[0] for part in ((data.x_test, data.y_test), (data.x_train, data.y_train))
    ]
    return losses[0] - losses[1]


_DECAY_RATES = (0.3, 1.0)
_WEIGHT_DECAYS = (0.01, 0.03, 0.1)
_SCALE_STEPS = 500
_TWIN_STEPS = 100


def effective_rate(seed: int, report: Report) -> Findings:
    """Effective rates over learning rate and weight decay; and L2 replaced by its effective rate."""
    data, numbers = small_digits(), dict[str, float]()
    grid, logs, rates = [], [], []
    for rate in _DECAY_RATES:
        row = []
        for decay in _WEIGHT_DECAYS:
            learner = learner_of(made(dense_net((196, 100, 10)), "batchnorm", seed), rate)
            weight, norms = _hidden(learner.model)[0], []  # type: ignore[var-annotated]

            def decayed(
                _: int,
                weight: Tensor = weight,
                factor: float = 1 - rate * decay,
                norms: list[float] = norms,
            ) -> None:
                norms.append(float(weight.detach().square().sum()))
                with torch.no_grad():
                    weight.mul_(factor)

            fit(learner, data, steps=_SCALE_STEPS, batch_size=64, seed=seed, each=decayed)
            size = float(np.mean(norms[-100:]))
            row.append(rate / size)
            logs.append(math.log(rate * decay))
            rates.append(math.log(rate / size))
            report(0.5 * len(logs) / 6)
        grid.append([math.log10(value) for value in row])
    numbers["exponent"] = float(np.polyfit(logs, rates, 1)[0])
    with_decay, without, plain, curves = _twins(data, seed, report)
    numbers["moved by the effective rate"] = _distance(with_decay, without)
    numbers["moved by L2"] = _distance(with_decay, plain)
    numbers["explained"] = numbers["moved by L2"] / max(numbers["moved by the effective rate"], 1e-12)
    return Findings(numbers, {"norms": curves}, {"rates": grid})


def _hidden(model: nn.Module) -> list[Tensor]:
    """Returns the weights that a norm stands behind."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)][:-1]


def _twins(data: Dataset, seed: int, report: Report) -> tuple[Array, Array, Array, dict[str, Curve]]:
    """Trains with L2; without it at the rates that keep η / ‖w‖² the same; and without it at the plain rate.

    A step with L2 is w' = (1 − ηλ) w − η g, whose direction is that of w − η / (1 − ηλ) g. As g goes with
    1 / ‖w‖, weights of another size take the same turn at the rate η / (1 − ηλ) · ‖v‖² / ‖w‖². All in
    float64.

    Returns:
        Held-out probabilities of the three, and the squared norms of the first layer's weights over steps.
    """
    rate, decay = 0.1, 0.03
    models = [made(dense_net((196, 100, 100, 10)), "batchnorm", seed).double() for _ in range(3)]
    for norm in (module for model in models for module in model.modules() if isinstance(module, BatchNorm1d)):
        norm.eps = 1e-12  # that the output does not depend on ‖w‖ is true without eps
    x, y = torch.from_numpy(data.x_train).double(), torch.from_numpy(data.y_train)
    generator = torch.Generator().manual_seed(seed)
    sizes: list[list[float]] = [[], [], []]
    for step in range(_TWIN_STEPS):
        rows = torch.randint(len(x), (64,), generator=generator)
        squares = [[weight.detach().square().sum() for weight in _hidden(model)] for model in models]
        for i, model in enumerate(models):
            model.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            sizes[i].append(float(squares[i][0]))
            _take(
                model,
                i,
                rate,
                decay,
                [own / first for own, first in zip(squares[i], squares[0], strict=True)],
            )
        report(0.5 + 0.5 * (step + 1) / _TWIN_STEPS)
    held_out = torch.from_numpy(data.x_test).double()
    found = []
    for model in models:
        with evaluation(model, by_batch=True):
            found.append(model(held_out).softmax(1).numpy())
    names = ("with L2", "without, at L2's effective rate", "without, at the plain rate")
    steps = list(range(0, _TWIN_STEPS, 10))
    curves = {name: Curve(steps, size[::10]) for name, size in zip(names, sizes, strict=True)}
    return found[0], found[1], found[2], curves


def _take(model: nn.Module, which: int, rate: float, decay: float, ratios: Sequence[Tensor]) -> None:
    """Takes a step of SGD: the first model with L2 of hidden weights, the second at its rates."""
    hidden = {id(weight): ratio for weight, ratio in zip(_hidden(model), ratios, strict=True)}
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            own = rate
            if id(parameter) in hidden and which == 0:
                parameter.mul_(1 - rate * decay)
            elif id(parameter) in hidden and which == 1:
                own = float(rate / (1 - rate * decay) * hidden[id(parameter)])
            parameter.sub_(own * parameter.grad)


def _distance(a: Array, b: Array) -> float:
    """Returns the mean total variation of probabilities."""
    return float(np.abs(a - b).sum(1).mean() / 2)


_PLACES = {"before": "", "after": ":after-activation"}
_DROPOUTS = (0.0, 0.2, 0.5)
_PLACE_STEPS, _PLACE_RATE = 120, 0.05


def placement(seed: int, report: Report) -> Findings:
    """Held-out accuracy with the norm before and behind ReLU, by dropout in the dense layer."""
    data, numbers, grid = icons(), dict[str, float](), []
    for i, (place, option) in enumerate(_PLACES.items()):
        row = []
        for dropout in _DROPOUTS:
            arm = f"batchnorm{option}" + ("+dropout" if dropout else "")
            build = conv_net(16, 3, 9, filters=(8, 16), hidden=64, dropout=dropout)
            learner = learner_of(made(build, arm, seed), _PLACE_RATE, momentum=0.9)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                fit(learner, data, steps=_PLACE_STEPS, batch_size=64, seed=seed)
            row.append(accuracy(learner, data))
            numbers[f"{place}, dropout {dropout:g}"] = row[-1]
            report((i + len(row) / 3) / 2)
        grid.append(row)
    numbers["after less before"] = float(np.mean(grid[1]) - np.mean(grid[0]))
    numbers["dropout 0.2 less 0.5"] = float(np.mean([row[1] - row[2] for row in grid]))
    numbers["dropout 0.2 less none"] = float(np.mean([row[1] - row[0] for row in grid]))
    return Findings(numbers, {}, {"accuracy": grid})
