"""`calibrate`: running statistics of a whole model from a whole data set.

What a layer receives depends on the layers before it. With method="batch" these normalize by each batch, as
in training: one pass over the data, but the statistics of deeper layers depend on how the data is split into
batches. With method="layerwise" they normalize by the statistics found for them, as they will when deployed:
exact at any depth and for any split, in one pass per level of depth (layers of parallel branches share a
level), each as far into the model as its level. With `spill` it is one forward in total: every batch stops at
each norm until all batches have come there, and the state of its forward waits in a file.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from batchnorm.errors import DataError, OptionError
from batchnorm.statistics.calibration import Accumulator, CalibrationReport, LayerChange
from batchnorm.statistics.moments import PooledMoments

from .calibration.batches import Forward
from .calibration.layerwise import layerwise
from .calibration.layerwise_disk import layerwise_on_disk
from .calibration.observers import BatchObserver, running_buffers, running_statistics
from .calibration.passes import Method, Options, Passes
from .calibration.ranks import Ranks
from .norms.find import split_frozen, tracking_norms
from .norms.kinds import BatchNormBase
from .preconditions import verb
from .rollback import as_before_on_error


@verb()
def calibrate(
    model: nn.Module,
    data: Iterable[object],
    *,
    forward: Forward | None = None,
    progress: bool = False,
    method: Method = "batch",
    spill: str | Path | int | None = None,
    samples: int | None = None,
    group: distributed.ProcessGroup | Literal[False] | None = None,
    progress_file: str | Path | None = None,
    save_every: float = 60.0,
    keep_progress: bool = False,
) -> CalibrationReport:
    """Set the running statistics of every batch normalization to the statistics of all of `data`.

        running_mean = Σ n_b mean_b / Σ n_b
        running_var  = m2 / (n - 1),    n and m2 of all batches merged by Chan's formula

    where a layer receives n_b values per channel in batch b, on any rank. All but the norms runs as in
    evaluation; frozen norms use and keep their statistics. If it raises, on any rank, the model is as before.

    Args:
        model: with layers of torch's or of this library, on any device.
        data: tensors, (x, y) pairs, of which x is taken, or dicts of keyword arguments: samples of training,
            in eval form. With method="layerwise" a list or a DataLoader, not an iterator.
        forward: called as `forward(model, batch)` for batches of any other form.
        progress: show a progress bar (needs rich).
        method: how deeper norms get their input: "batch", one pass; "layerwise", exact, in several passes.
        spill: make "layerwise" one forward in total, which needs a folder for files, or the most bytes that
            they may take in a temporary one. Every batch must call the same norms in one order, each once.
        samples: stop after this many (on each rank); tensors of the last batch are cut. None = all.
        group: of torch.distributed, whose processes call this together, each with its own part of the data,
            and get the same statistics bit for bit. None = all processes, False = this process alone.
        progress_file: where to save the progress (needs safetensors). The same call on the same data resumes
            from it, bit for bit, and removes it. Each of several processes appends its rank to the name.
        save_every: seconds between two writes of that file.
        keep_progress: keep that file in the end, with the result, from which the same call takes it.

    Returns:
        A report: layers, samples, and how far each layer's statistics moved, in standard deviations.

    Raises:
        OptionError: no batch normalization to calibrate, or norms that depend on one another in circles.
        DataError: no batch, a batch of unknown form, a layer that received NaN or inf or a single value, or a
            progress file that is damaged or of another calibration.
        FileError, RankError: (an OSError, a RuntimeError) a file cannot be written, another process raised.

    Warns:
        UserWarning: names the layers that no sample reached; they are left as before.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> batchnorm.calibrate(model, torch.randn(256, 4).split(64)).samples
        256

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 2; Wu & Johnson 2021, arXiv:2105.07576, sec. 3.
    """
    options = Options(forward, progress, method, spill, samples, progress_file, save_every, keep_progress)
    return _calibrate(model, data, options, Ranks(group))


def _calibrate(model: nn.Module, data: Iterable[object], options: Options, ranks: Ranks) -> CalibrationReport:
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module  # its own forward waits for other ranks, or runs on copies
    prepared: list[tuple[tuple[str, ...], Passes]] = []

    def prepare() -> Tensor:
        options.check(data)
        frozen, norms = norms_to_calibrate(model)
        passes = Passes(model, norms, data, options, ranks)
        prepared.append((frozen, passes))
        same = [options.method, options.spill is None, options.keep_progress, dict(passes.layout.channels)]
        identity = zlib.crc32(json.dumps(same).encode())
        return torch.tensor([identity, passes.number, passes.is_finished], dtype=torch.float64)

    _check_agreement(ranks.gather(prepare, 3))
    ((frozen, passes),) = prepared
    with as_before_on_error(model):
        report = _finished(passes, _found(passes), frozen)
        if not options.keep_progress:
            passes.forget()
        report.warn_of_unreached(stacklevel=4)
    return report


def _found(passes: Passes) -> Accumulator:
    """Return what all passes find, or what an earlier call has found."""
    if passes.is_finished:
        return passes.kept()
    if passes.options.method == "batch":
        found = passes.run(BatchObserver(passes.norms))
    elif passes.options.spill is None:
        found = layerwise(passes)
    else:
        found = layerwise_on_disk(passes)
    if passes.options.keep_progress:
        passes.keep(found)
    return found


def norms_to_calibrate(model: nn.Module) -> tuple[tuple[str, ...], dict[str, BatchNormBase]]:
    """Return the names of the layers that are frozen, and the others.

    Raises:
        OptionError: there are no others, or the model has no values yet.
    """
    frozen, norms = split_frozen(tracking_norms(model))
    if not norms:
        but = "that is not frozen: batchnorm.unfreeze" if frozen else "with running statistics to calibrate"
        raise OptionError(f"{type(model).__name__} has no batch normalization {but}")
    bare = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if bare:
        raise OptionError(
            f"{type(model).__name__} is on the meta device ({bare[0]}), without values: load it first, by "
            "load_state_dict(state, assign=True)"
        )
    lazy = [name for name, norm in norms.items() if is_lazy(norm._buffers["running_mean"])]  # type: ignore[arg-type]
    if lazy:
        raise OptionError(f"{', '.join(lazy)} are not initialized: run the model once on a batch")
    return tuple(frozen), norms


def _check_agreement(rows: list[Tensor]) -> None:
    """Raise unless all ranks have the same layers and options, and are at the same pass."""
    identities, *passes = zip(*(row.tolist() for row in rows), strict=True)
    if len(set(identities)) > 1:
        raise OptionError("calibrate was called with another model or method on some ranks than on others")
    if any(len(set(numbers)) > 1 for numbers in passes):
        raise OptionError(
            "the progress files of the ranks are not of the same pass: delete them to start over"
        )


def _finished(passes: Passes, found: Accumulator, frozen: tuple[str, ...]) -> CalibrationReport:
    """Write the running statistics, once those of all layers are checked."""
    changes: list[LayerChange] = []
    values: list[tuple[Tensor, Tensor]] = []
    try:
        for name, norm in [(n, norm) for n, norm in passes.norms.items() if n in found.moments]:
            new = running_statistics(name, norm, found.moments[name])
            values += zip(running_buffers(norm), new, strict=True)
            changes.append(_change(name, norm, found.moments[name], name not in found.dependent))
    except DataError:
        passes.forget()  # or the same result would be refused again
        raise
    _write(values)
    return CalibrationReport(
        samples=found.samples,
        batches=found.batches,
        layers=tuple(changes),
        unreached=tuple(name for name in passes.norms if name not in found.moments),
        frozen=frozen,
        method=passes.options.method,
        passes=passes.number,
        ranks=passes.ranks.size,
    )


def _write(values: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each value into its buffer."""
    with torch.no_grad():  # also for a buffer that requires gradients
        for buffer, value in values:
            buffer.copy_(value)


def _change(name: str, norm: BatchNormBase, found: PooledMoments, exact: bool) -> LayerChange:
    """Return how far the statistics in the buffers are from those found."""
    old_mean, old_var = (buffer.detach().cpu().double().numpy() for buffer in running_buffers(norm))
    new = found.mean.numpy(), (found.m2 / (found.count - 1)).numpy()
    return LayerChange.between(name, int(found.count), (old_mean, old_var), new, norm.eps, exact)
