"""Experiments on what is learned and served: adaptation, padding, and γ and β alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.claims.claim import Curve, Findings, Report
from batchnorm.claims.fitting import accuracy, digits, fit, learner_of, made, small_digits
from batchnorm.claims.networks import conv_net, residual_net
from batchnorm.claims.tools.corruptions import CORRUPTIONS, STRENGTHS, adapted_error, corrupted
from batchnorm.studies.data import Dataset, load_data
from batchnorm.studies.learner_torch import make_learner
from batchnorm.studies.settings import Recipe, Setting
from batchnorm.studies.tasks import RunTask
from batchnorm.studies.training import train

_TEST_BATCHES = (2, 8, 32, 150)
_PRIORS = (0, 16, 256)
_TRAIN_STEPS = 150


def adaptation(seed: int, report: Report) -> Findings:
    """Error on corrupted images without adaptation, with a prior and a small batch, and by the batch."""
    data, numbers = small_digits(), dict[str, float]()
    models = {}
    for arm in ("batchnorm", "groupnorm"):
        learner = learner_of(made(conv_net(14, 1, 10), arm, seed), 0.1, momentum=0.9)
        fit(learner, data, steps=_TRAIN_STEPS, batch_size=64, seed=seed)
        models[arm] = learner.model
        numbers[f"clean, {arm}"] = 1 - accuracy(learner, data)
    report(0.3)
    x, y = torch.from_numpy(data.x_test[:300]), torch.from_numpy(data.y_test[:300])
    ways = {
        "not adapted": ("batchnorm", None, 250),
        "partial": ("batchnorm", 16.0, 8),
        "full": ("batchnorm", 0.0, 500),
        "group normalization": ("groupnorm", None, 250),
    }
    errors: dict[str, list[float]] = {name: [] for name in ways}
    middle = []
    for kind in CORRUPTIONS:
        for strength in STRENGTHS:
            images = corrupted(x, kind, strength, seed)
            middle += [images[:150]] if strength == 3 else []
            for name, (arm, prior, size) in ways.items():
                model = copy.deepcopy(models[arm])
                errors[name].append(adapted_error(model, images, y, prior=prior, batch_size=size))
        report(0.3 + 0.3 * (list(CORRUPTIONS).index(kind) + 1) / len(CORRUPTIONS))
    for name, values in errors.items():
        numbers[f"error, {name}"] = float(np.mean(values))
    plain = numbers["error, not adapted"]
    for name in ("partial", "full", "group normalization"):
        numbers[f"saved: {name}"] = 1 - numbers[f"error, {name}"] / plain
    curves = {}
    for prior in _PRIORS:
        by_batch = [
            float(
                np.mean(
                    [
                        adapted_error(
                            copy.deepcopy(models["batchnorm"]), images, y[:150], prior=prior, batch_size=size
                        )
                        for images in middle
                    ]
                )
            )
            for size in _TEST_BATCHES
        ]
        curves[f"prior {prior}"] = Curve(_TEST_BATCHES, by_batch)
    ends = (_TEST_BATCHES[0], _TEST_BATCHES[-1])
    for name, arm in (("not adapted", "batchnorm"), ("group normalization", "groupnorm")):
        error = float(
            np.mean(
                [adapted_error(models[arm], images, y[:150], prior=None, batch_size=250) for images in middle]
            )
        )
        curves[name] = Curve(ends, (error, error))
    report(1.0)
    return Findings(numbers, {"errors": curves})


def padding(seed: int, report: Report) -> Findings:
    """How far predictions move with padding, and accuracy, by the mask, on speech and on text."""
    numbers: dict[str, float] = {}
    cases = {"vowels": ("conv1d", 8), "languages": ("characters", 1)}
    for i, (name, (network, epochs)) in enumerate(cases.items()):
        data = _first(load_data(name), 1000, 300)
        for arm in ("batchnorm", "batchnorm:unmasked"):
            task = RunTask(
                Setting(name, network, 32), Recipe(epochs=epochs, optimizer="adam"), arm, 1e-3, seed
            )
            run = train(task, data, make_learner, lambda _: None)
            which = "unmasked" if "unmasked" in arm else "masked"
            assert run.movements is not None
            numbers[f"{name}: accuracy, {which}"] = run.accuracy
            numbers[f"{name}: moved by padding, {which}"] = run.movements.batch.by_padding
            numbers[f"{name}: moved by batch-mates, {which}"] = run.movements.batch.by_mates
            report((i + (1 if which == "unmasked" else 0.5)) / len(cases))
    for name in cases:
        numbers[f"{name}: moved"] = numbers[f"{name}: moved by padding, unmasked"]
        numbers[f"{name}: gain"] = (
            numbers[f"{name}: accuracy, masked"] - numbers[f"{name}: accuracy, unmasked"]
        )
    return Findings(numbers)


def _first(data: Dataset, train: int, held_out: int) -> Dataset:
    """Returns data with the first examples alone; they are in random order."""
    assert data.lengths_train is not None
    assert data.lengths_test is not None
    return replace(
        data,
        x_train=data.x_train[:train],
        y_train=data.y_train[:train],
        lengths_train=data.lengths_train[:train],
        x_test=data.x_test[:held_out],
        y_test=data.y_test[:held_out],
        lengths_test=data.lengths_test[:held_out],
    )


_DEPTH, _WIDTH = 6, 64
_AFFINE_STEPS = 300


def affine_alone(seed: int, report: Report) -> Findings:
    """Held-out accuracy where γ and β alone learn, as many random weights, and everything."""
    data, numbers = digits(), dict[str, float]()
    histogram = Curve((), ())
    for i, which in enumerate(("all", "affine", "random")):
        model = made(residual_net(784, _DEPTH, 10, _WIDTH), "batchnorm", seed)
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for norm in norms:
                norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator))
        keep = _choose(model, norms, which, generator)
        learner = learner_of(model, 0.1, momentum=0.9)
        fit(learner, data, steps=_AFFINE_STEPS, batch_size=64, seed=seed, each=keep)
        numbers[which] = accuracy(learner, data)
        if which == "affine":
            gammas = torch.cat([norm.weight.detach() for norm in norms]).abs()
            numbers["off"] = float((gammas < 0.01).double().mean())
            numbers["small"] = float((gammas < 0.1).double().mean())
            counts, edges = np.histogram(gammas.numpy(), bins=20, range=(0, 2))
            histogram = Curve([float(v) for v in edges[:-1]], [float(v) / len(gammas) for v in counts])
        report((i + 1) / 3)
    numbers["more than random weights"] = numbers["affine"] - numbers["random"]
    numbers["share of all"] = numbers["affine"] / numbers["all"]
    return Findings(numbers, {"gamma": {"batchnorm": histogram}})


def _choose(model: nn.Module, norms: list[_BatchNorm], which: str, generator: torch.Generator):  # type: ignore[no-untyped-def]
    """Freezes what does not learn; of random weights, returns what puts the others back before each step."""
    affine = {id(parameter) for norm in norms for parameter in norm.parameters()}
    for parameter in model.parameters():
        if which != "all":
            parameter.requires_grad_((id(parameter) in affine) == (which == "affine"))
    if which != "random":
        return
    chosen = sum(parameter.numel() for norm in norms for parameter in norm.parameters())
    others = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in others)
    rows = torch.randperm(total, generator=generator)[:chosen]
    mask = torch.zeros(total).scatter_(0, rows, 1.0)
    for parameter, own in zip(others, mask.split([parameter.numel() for parameter in others]), strict=True):  # type: ignore[no-untyped-call]
        shaped = own.view_as(parameter)
        parameter.register_hook(lambda gradient, shaped=shaped: gradient * shaped)  # type: ignore[no-untyped-call]
    return
