"""Builds and trains the networks of the experiments, by the study's learner."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.studies.arms import parse_arm
from batchnorm.studies.data import Dataset, load_data
from batchnorm.studies.learner_torch import TorchLearner
from batchnorm.studies.networks_torch import NormFactory
from batchnorm.studies.padding import Array
from batchnorm.studies.settings import Recipe
from batchnorm.studies.training import evaluate

Build = Callable[[NormFactory], nn.Module]


@functools.cache
def digits() -> Dataset:
    """Returns the packaged digits, 28 × 28."""
    return load_data("digits")


@functools.cache
def small_digits() -> Dataset:
    """Returns the packaged digits at half their size, `[N, 1, 14, 14]`: a quarter of the time."""
    data = digits()
    return Dataset(
        "small digits", data.source, _halved(data.x_train), data.y_train, _halved(data.x_test), data.y_test
    )


def _halved(images: Array) -> Array:
    means: Array = images.reshape(len(images), 1, 14, 2, 14, 2).mean(axis=(3, 5))
    return means


@functools.cache
def icons() -> Dataset:
    """Returns the packaged icons, `[N, 3, 16, 16]`."""
    return load_data("icons")


def first_held_out(data: Dataset, examples: int) -> Dataset:
    """Returns data with the first held-out examples alone, where accuracy is looked up often."""
    return replace(data, x_test=data.x_test[:examples], y_test=data.y_test[:examples])


def made(build: Build, arm: str, seed: int) -> nn.Module:
    """Returns a network for an arm; those of one seed start from the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(NormFactory(parse_arm(arm))).train()


def learner_of(
    model: nn.Module,
    rate: float,
    *,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> TorchLearner:
    """Returns the study's learner of a network, without an arm's penalties."""
    recipe = Recipe(optimizer=optimizer, momentum=momentum, weight_decay=weight_decay)
    return TorchLearner(model, parse_arm("none"), recipe, rate)


def fit(
    learner: TorchLearner,
    data: Dataset,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    first: int = 0,
    each: Callable[[int], None] | None = None,
    order: Callable[[Array], Array] | None = None,
) -> bool:
    """Trains for a number of steps, over the data again and again in an order of the seed's.

    Args:
        learner: of a network.
        data: with training examples.
        steps: to take at most.
        batch_size: examples per step; the rest of an epoch is left out.
        seed: of the order.
        first: how many steps came before, so that a run in two parts is the same as in one.
        each: called with the number of steps taken, before each step.
        order: puts the rows of a batch in another order.

    Returns:
        Whether the loss stayed finite.
    """
    per_epoch = len(data.x_train) // batch_size
    rows = np.arange(0)
    for step in range(first, first + steps):
        place = step % per_epoch
        if place == 0 or step == first:
            rows = learner.permutation(len(data.x_train), 1_000_003 * seed + step // per_epoch)
        if each is not None:
            each(step)
        batch = rows[place * batch_size : (place + 1) * batch_size]
        if order is not None:
            batch = order(batch)
        if not math.isfinite(learner.step(data.x_train[batch], data.y_train[batch])):
            return False
    return True


def accuracy(learner: TorchLearner, data: Dataset) -> float:
    """Returns the held-out accuracy by running statistics."""
    return evaluate(learner, data.x_test, data.y_test)[1]


def train_accuracy(learner: TorchLearner, data: Dataset, examples: int = 1000) -> float:
    """Returns the accuracy on the first training examples by running statistics."""
    return evaluate(learner, data.x_train[:examples], data.y_train[:examples])[1]


def batch_of(data: Dataset, examples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns training examples drawn by a seed, as tensors."""
    rows = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(seed))[:examples].numpy()
    return torch.from_numpy(data.x_train[rows]), torch.from_numpy(data.y_train[rows])
