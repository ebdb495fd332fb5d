"""Ordinary use: `assert_type` holds in mypy and in pyright, both strict. It is checked, and not run."""

# pyright: strict

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm
from batchnorm import functional
from batchnorm.doctor.findings import Diagnosis, Finding
from batchnorm.models.norms.report import ModelReport, NormRow
from batchnorm.statistics.calibration import CalibrationReport, LayerChange
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import Policy


class Network(nn.Module):
    """A model whose norms are layers of batchnorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.norm = batchnorm.BatchNorm2d(channels, activation="relu", nonfinite="skip")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def layers(x: Tensor, mask: Tensor) -> None:
    """Layers are called, configured, and passed as stock ones."""
    layer = batchnorm.BatchNorm2d(
        3, eps=1e-3, momentum=None, statistics=batchnorm.Ghost(16), activation="relu"
    )
    assert_type(layer(x), Tensor)
    assert_type(layer(x, x, mask), Tensor)
    assert_type(layer(x, mask=mask), Tensor)
    assert_type(layer(x, lengths=torch.tensor([3, 5])), Tensor)
    assert_type(layer.forward(x), Tensor)
    assert_type(batchnorm.BatchNorm1d(3)(x), Tensor)
    assert_type(batchnorm.BatchNorm3d(3)(x), Tensor)
    assert_type(batchnorm.SyncBatchNorm(3)(x), Tensor)
    assert_type(layer.running_mean, Tensor | None)
    assert_type(layer.statistics, Policy)
    layer.statistics = batchnorm.Renorm(r_max=2, d_max=1)
    stock: nn.BatchNorm2d = layer
    make: Callable[[int], nn.Module] = batchnorm.BatchNorm2d
    nn.Sequential(make(3), stock)


def policies() -> list[Policy]:
    """Every policy is a Policy, and keeps its own type."""
    assert_type(batchnorm.Ghost(size=2, shuffle=True).size, int)
    assert_type(batchnorm.Adapted(prior=16), batchnorm.Adapted)
    return [
        batchnorm.Batch(),
        batchnorm.Ghost(8),
        batchnorm.Synced(over=batchnorm.Batch()),
        batchnorm.Renorm(),
        batchnorm.Running(),
        batchnorm.Adapted(16),
    ]


def verbs(model: Network, x: Tensor, y: Tensor) -> None:
    """Verbs take data of every usual kind; those that work in place return the type of the model."""
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    report = batchnorm.calibrate(model, loader, method="layerwise", samples=64)
    assert_type(report, CalibrationReport)
    assert_type(report.samples, int)
    assert_type(report.layers, tuple[LayerChange, ...])
    assert_type(batchnorm.calibrate(model, [x], forward=lambda model, batch: model(batch)), CalibrationReport)
    assert_type(batchnorm.inspect(model, x), ModelReport)
    assert_type(batchnorm.inspect(model, x).rows, tuple[NormRow, ...])
    diagnosis = batchnorm.diagnose(model, loader, optimizer=torch.optim.SGD(model.parameters()))
    assert_type(diagnosis, Diagnosis)
    assert_type(diagnosis.findings, tuple[Finding, ...])
    assert_type(diagnosis.is_serious, bool)
    assert_type(batchnorm.convert(model, example=x), Network)
    assert_type(batchnorm.convert(model, batchnorm.Synced(), domains=2, domain_affine=True), Network)
    assert_type(batchnorm.fuse(model, x), Network)
    assert_type(batchnorm.freeze(model, parameters=True), Network)
    assert_type(batchnorm.unfreeze(model), Network)
    assert_type(batchnorm.revert(model, example=x), nn.Module)
    assert_type(batchnorm.fold(model, x), nn.Module)
    states = [model.state_dict(), model.state_dict()]
    assert_type(batchnorm.merge_statistics(states, [300, 500]), dict[str, Tensor])


def contexts(model: Network, x: Tensor, batches: Iterable[Tensor]) -> None:
    """Contexts stand in with statements, together too."""
    with batchnorm.lean(), batchnorm.mask(model, x[:, 0] > 0):
        model(x)
    with batchnorm.accumulate(model, steps=4), batchnorm.domain(model, 1):
        for batch in batches:
            model(batch)
    with batchnorm.kernels.use("eager"):
        assert_type(batchnorm.kernels.explain(x), str)
    assert_type(batchnorm.kernels.cache_folder(), Path | None)
    assert_type(batchnorm.reuse_memory(), bool)


def functions(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Functions of tensors."""
    y = functional.batch_norm(x, mean, var, training=True, statistics=batchnorm.Ghost(4), axis=-1)
    assert_type(y, Tensor)
    assert_type(functional.pure_batch_norm(x, mean, var), tuple[Tensor, Tensor | None, Tensor | None])
    assert_type(functional.moments(x), PooledMoments[Tensor])
    assert_type(functional.moments(x).mean, Tensor)
    y, moments = functional.normalize_batch(x)
    assert_type(moments.m2, Tensor)


def keras_layers(x: NDArray[np.float32]) -> None:
    """Keras carries no types that every checker reads; what is ours has its own."""
    layer = batchnorm.keras.BatchNormalization(activation="relu", statistics=batchnorm.Ghost(32))
    assert_type(layer.frozen, bool)
    callback = batchnorm.keras.Calibrate(x, when="validation")
    assert_type(callback, batchnorm.keras.Calibrate)


def errors(layer: batchnorm.BatchNorm2d, x: Tensor) -> str:
    """Errors are caught as this library's or as the built-in ones."""
    try:
        layer(x)
    except batchnorm.errors.InputShapeError as error:
        assert_type(error.layer, str | None)
        return error.message
    except (ValueError, batchnorm.errors.BatchNormError) as error:
        return str(error)
    return ""
