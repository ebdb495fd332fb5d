"""Running statistics := statistics of a whole data set."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import DataError, MissingExtraError, OptionError
from batchnorm.statistics.calibration import CalibrationReport, LayerChange
from batchnorm.statistics.moments import PooledMoments, merge
from batchnorm.torch.functional import moments

from .norms import split_frozen, tracking_norms

Forward = Callable[[nn.Module, Any], Any]
_RUNNING = ("running_mean", "running_var")


def calibrate(
    model: nn.Module, data: Iterable[Any], *, forward: Forward | None = None, progress: bool = False
) -> CalibrationReport:
    """Set the running statistics of every batch normalization to the statistics of all of `data`.

    One pass over `data`, without gradients: normalizations use the statistics of each batch, everything else
    (dropout, for one) is in evaluation mode. With n_b, mean_b, m2_b of what a layer received in batch b:

        running_mean = Σ n_b mean_b / Σ n_b
        running_var  = m2 / (n - 1),    n and m2 of all batches merged by Chan's formula

    so that batches of unequal size weigh by their size. Momentum, modes and batch counters are as before, and
    frozen layers use and keep their statistics. A layer with no normalization before it gets the same
    statistics however the data is split; a deeper one receives inputs that were normalized batch by batch, so
    its statistics depend on the split (the report marks it): larger batches come closer.

    Args:
        model: with layers of torch's or of this library, on any device.
        data: an iterable of tensors, of (x, y) pairs, of which x is taken, or of dicts of keyword arguments;
            tensors are moved to the model's device. Its samples should be those of training, in eval form.
        forward: called as `forward(model, batch)` for batches of any other form.
        progress: show a progress bar (needs rich).

    Returns:
        A report: layers, samples, and how far each layer's statistics moved, in standard deviations.

    Raises:
        OptionError: the model has no batch normalization with running statistics.
        DataError: no batch, a batch of unknown form, or a layer that received NaN or inf or a single value.

    Warns:
        UserWarning: names the layers that no sample reached; they are left as before.

    An exception or an interruption, at any point, leaves the model exactly as it was.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 2; Wu & Johnson 2021, arXiv:2105.07576, sec. 3.
    """
    frozen, norms = split_frozen(tracking_norms(model))
    if not norms:
        but = "that is not frozen: batchnorm.unfreeze" if frozen else "with running statistics to calibrate"
        raise OptionError(f"{type(model).__name__} has no batch normalization {but}")
    collector = _Collector({norm: name for name, norm in norms.items()})
    samples = batches = 0
    with _batch_statistics(model, norms.values()), collector.listening(), torch.no_grad():
        for batch in _shown(data, progress):
            collector.begin_pass()
            samples += _run(model, batch, forward)
            batches += 1
    if batches == 0:
        raise DataError("calibrate received no batch: data is empty, or an iterator that was used up before")
    return replace(_finish(norms, collector, samples, batches), frozen=tuple(frozen))


@dataclass
class _Collector:
    """Merges the moments of what each layer receives, by the layer's name."""

    names: dict[_BatchNorm, str]

    def __post_init__(self) -> None:
        self.moments: dict[str, PooledMoments] = {}
        self.inexact: set[str] = set()
        self._normalized = False

    def begin_pass(self) -> None:
        self._normalized = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        handles = [norm.register_forward_pre_hook(self._receive, with_kwargs=True) for norm in self.names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _receive(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(norm, _BatchNorm)
        name = self.names[norm]
        received = moments(args[0] if args else kwargs["input"])
        self.moments[name] = merge(self.moments[name], received) if name in self.moments else received
        if self._normalized:
            self.inexact.add(name)
        self._normalized = True


@contextlib.contextmanager
def _batch_statistics(model: nn.Module, norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Evaluation mode, with running statistics hidden: a norm that has none takes the batch's."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(norm, {name: norm._buffers[name] for name in _RUNNING}) for norm in norms]
    try:
        for module, _ in modes:
            module.training = False
        for norm, running in buffers:
            norm._buffers.update(dict.fromkeys(running))
        yield
    finally:
        for module, training in modes:
            module.training = training
        for norm, running in buffers:
            norm._buffers.update(running)


def _run(model: nn.Module, batch: Any, forward: Forward | None) -> int:
    """Run one batch and return its number of samples."""
    if forward is not None:
        forward(model, batch)
        return _samples(batch)
    if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2 and isinstance(batch[0], Tensor):
        batch = batch[0]
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    if isinstance(batch, Tensor):
        model(batch.to(device))
    elif isinstance(batch, Mapping):
        model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    else:
        raise DataError(
            "calibrate takes tensors, (x, y) pairs and dicts of keyword arguments; "
            f"got a {type(batch).__name__}: pass forward=lambda model, batch: model(...)"
        )
    return _samples(batch)


def _samples(batch: Any) -> int:
    """Return the length of the first tensor in a batch of any nesting."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    parts = (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    )
    return next((count for count in map(_samples, parts) if count), 0)


def _finish(
    norms: dict[str, _BatchNorm], collector: _Collector, samples: int, batches: int
) -> CalibrationReport:
    """Check everything, then write everything."""
    reached = {name: found for name, found in collector.moments.items() if found.count > 0}
    changes, values = [], []
    for name, norm in norms.items():
        if name not in reached:
            continue
        mean, var = _running_statistics(name, reached[name])
        changes.append(_change(name, norm, reached[name], name not in collector.inexact))
        values += [(norm.running_mean, mean), (norm.running_var, var)]
    _write(values)
    unreached = tuple(name for name in norms if name not in reached)
    if unreached:
        warnings.warn(
            f"calibrate: no sample reached {', '.join(unreached)}; left as before", UserWarning, stacklevel=3
        )
    return CalibrationReport(samples, batches, tuple(changes), unreached)


def _running_statistics(name: str, found: PooledMoments) -> tuple[Tensor, Tensor]:
    if found.count < 2:
        raise DataError(
            "received one value per channel in all of the data: no variance; the model is unchanged", name
        )
    var = found.m2 / (found.count - 1)
    if not (found.mean.isfinite().all() and var.isfinite().all()):
        raise DataError("received NaN or inf; the model is unchanged", name)
    return found.mean, var


def _change(name: str, norm: _BatchNorm, found: PooledMoments, exact: bool) -> LayerChange:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    old_mean, old_var = (buffer.to(found.mean.dtype) for buffer in (norm.running_mean, norm.running_var))
    new_std = (found.m2 / (found.count - 1) + norm.eps).sqrt()
    shift = ((found.mean - old_mean).abs() / new_std).max()
    ratio = new_std / (old_var + norm.eps).sqrt()
    widest = ratio[ratio.log().abs().argmax()]
    return LayerChange(name, int(found.count), shift.item(), widest.item(), exact)


def _write(values: list[tuple[Tensor | None, Tensor]]) -> None:
    """Copy each value into its buffer; on an interruption midway, put all of them back."""
    before = [None if buffer is None else buffer.clone() for buffer, _ in values]
    try:
        for buffer, value in values:
            if buffer is not None:
                buffer.copy_(value)
    except BaseException:
        for (buffer, _), old in zip(values, before, strict=True):
            if buffer is not None and old is not None:
                buffer.copy_(old)
        raise


def _shown(data: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return data
    try:
        from rich.progress import track
    except ModuleNotFoundError:
        raise MissingExtraError("calibrate(progress=True)", "rich", "study") from None
    total = len(data) if isinstance(data, Sized) else None
    return track(data, description="Calibrating", total=total)
