"""Running statistics := statistics of a whole data set."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from batchnorm.errors import ArgumentTypeError, DataError, OptionError
from batchnorm.statistics.calibration import CalibrationReport

from .calibration.accumulator import Layout
from .calibration.batches import Forward
from .calibration.layerwise import layerwise
from .calibration.layerwise_disk import spilled
from .calibration.outcome import change, running_statistics, write
from .calibration.passes import Passes, Result, in_one_pass
from .calibration.progress_file import ProgressFile, fingerprint
from .calibration.ranks import Ranks
from .norms.find import split_frozen, tracking_norms
from .rollback import as_before_on_error
from .verb import verb

Method = Literal["batch", "layerwise"]


@verb()
def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: bool = False,
    method: Method = "batch",
    spill: str | Path | int | None = None,
    samples: int | None = None,
    group: Any = None,
    progress_file: str | Path | None = None,
    save_every: float = 60.0,
    keep_progress: bool = False,
) -> CalibrationReport:
    """Set the running statistics of every batch normalization to the statistics of all of `data`.

    Without gradients, and with everything but the normalizations (dropout, for one) in evaluation mode. With
    n_b, mean_b, m2_b of what a layer received in batch b, on any rank:

        running_mean = Σ n_b mean_b / Σ n_b
        running_var  = m2 / (n - 1),    n and m2 of all batches merged by Chan's formula

    so that batches of unequal size weigh by their size. Momentum, modes and batch counters are as before,
    and frozen layers use and keep their statistics.

    What a layer receives depends on the layers before it. With method="batch" they normalize by each batch,
    as in training: one pass, but the statistics of deeper layers depend on how the data is split (the report
    marks them); larger batches come closer. With method="layerwise" they normalize by the statistics found
    for them, as they will when deployed: exact at any depth, however the data is split. That takes one pass
    for each level of depth (layers of parallel branches share one), each as far into the model as its level.

    Args:
        model: with layers of torch's or of this library, on any device.
        data: an iterable of tensors, of (x, y) pairs, of which x is taken, or of dicts of keyword arguments;
            tensors are moved to the model's device. Its samples should be those of training, in eval form.
            With method="layerwise" it is gone over several times: a list or a DataLoader, not an iterator.
        forward: called as `forward(model, batch)` for batches of any other form.
        progress: show a progress bar (needs rich).
        method: "batch" or "layerwise", as above.
        spill: with method="layerwise", one forward in total instead: every batch stops at each norm until all
            have come there, and what its forward holds waits in a file. A folder for the files, or the most
            bytes that they may take in a temporary one. Every batch must call the same norms in one order,
            each once. None = passes over the data.
        samples: stop after this many (on each rank); tensors of the last batch are cut. None = all.
        group: of torch.distributed, whose processes call this together, each with its own part of the data,
            of any size, and get the same statistics bit for bit. None = all processes where it is
            initialized, False = this process alone.
        progress_file: where to note how far it has come (needs safetensors); the same call on the same data
            goes on from there and finds the same statistics bit for bit. Removed in the end. With several
            processes, each has its own, with its rank behind the name.
        save_every: seconds between two writes of that file.
        keep_progress: leave that file in the end, with the result, which the same call then takes from it:
            delete it once what you make of the model is safe.

    Returns:
        A report: layers, samples, and how far each layer's statistics moved, in standard deviations.

    Raises:
        OptionError: the model has no batch normalization with running statistics, or norms that depend on one
            another in circles (layerwise).
        DataError: no batch, a batch of unknown form, a layer that received NaN or inf or a single value, or a
            progress file that is damaged or of another calibration.
        FileError: (an OSError) the progress file cannot be written.
        RankError: (a RuntimeError) another process raised.

    Warns:
        UserWarning: names the layers that no sample reached; they are left as before.

    An exception or an interruption, at any point and on any rank, leaves the model exactly as it was.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 2; Wu & Johnson 2021, arXiv:2105.07576, sec. 3.
    """
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module  # its own forward waits for other ranks, or runs on copies
    ranks = Ranks(group)
    prepared: list[tuple[tuple[str, ...], dict[str, _BatchNorm], Passes]] = []

    def prepare() -> Tensor:
        _check_options(method, samples, spill, progress_file, data)
        _check_progress(progress_file, save_every, keep_progress)
        frozen, norms = _norms(model)
        layout = Layout.of(norms)
        file = None
        if progress_file is not None:
            options = {"method": method, "samples": samples, "ranks": ranks.size, "rank": ranks.rank}
            path = Path(progress_file)
            path = path if ranks.size == 1 else path.with_name(f"{path.name}.{ranks.rank}")
            file = ProgressFile(path, fingerprint(model, norms, options), save_every)
        passes = Passes(model, data, forward, samples, layout, ranks, file, progress)
        prepared.append((frozen, norms, passes))
        same = [method, spill is None, keep_progress, dict(layout.channels)]
        identity = zlib.crc32(json.dumps(same).encode())
        return torch.tensor([identity, passes.number, passes.is_finished], dtype=torch.float64)

    _check_agreement(ranks.gather(prepare, 3))
    ((frozen, norms, passes),) = prepared
    with as_before_on_error(model):
        report = _finish(
            norms, _found(model, norms, passes, method, spill, keep_progress), frozen, method, passes
        )
        if not keep_progress:
            passes.forget()
        if report.unreached:
            names = ", ".join(report.unreached)
            message = f"calibrate: no sample reached {names}; left as before"
            warnings.warn(message, UserWarning, stacklevel=3)
    return report


def _found(
    model: nn.Module,
    norms: dict[str, _BatchNorm],
    passes: Passes,
    method: str,
    spill: str | Path | int | None,
    keep: bool,
) -> Result:
    """Return what all passes find, or have found in an earlier call."""
    if passes.is_finished:
        return passes.result()
    if method == "batch":
        found = in_one_pass(norms, passes)
    elif spill is None:
        found = layerwise(model, norms, passes)
    else:
        found = spilled(model, norms, passes, spill)
    if keep:
        passes.keep(found)
    return found


def _check_options(
    method: str,
    samples: int | None,
    spill: str | Path | int | None,
    progress_file: str | Path | None,
    data: Iterable[Any],
) -> None:
    if method not in ("batch", "layerwise"):
        raise OptionError(f"method is 'batch' or 'layerwise'; got {method!r}")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise OptionError(f"samples is a number of 1 or more, or None for all; got {samples!r}")
    if spill is not None and (method != "layerwise" or progress_file is not None):
        raise OptionError("spill= is for method='layerwise', and without progress_file=")
    if method == "layerwise" and spill is None and isinstance(data, Iterator):
        raise OptionError(
            f"method='layerwise' goes over data several times, and a {type(data).__name__} is used up by the "
            "first: pass a list or a DataLoader, or spill="
        )


def _check_progress(progress_file: object, save_every: object, keep_progress: bool) -> None:
    if progress_file is not None and not isinstance(progress_file, (str, Path)):
        raise ArgumentTypeError(f"progress_file is a path; got a {type(progress_file).__name__}")
    if isinstance(save_every, bool) or not isinstance(save_every, (int, float)) or not save_every >= 0:
        raise OptionError(f"save_every is a number of seconds, 0 or more; got {save_every!r}")
    if keep_progress and progress_file is None:
        raise OptionError("keep_progress=True is for progress_file=: name one")


def _norms(model: nn.Module) -> tuple[tuple[str, ...], dict[str, _BatchNorm]]:
    """Return the names of the layers that are frozen, and the others."""
    frozen, norms = split_frozen(tracking_norms(model))
    if not norms:
        but = "that is not frozen: batchnorm.unfreeze" if frozen else "with running statistics to calibrate"
        raise OptionError(f"{type(model).__name__} has no batch normalization {but}")
    lazy = [name for name, norm in norms.items() if is_lazy(norm._buffers["running_mean"])]  # type: ignore[arg-type]
    bare = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if bare:
        raise OptionError(
            f"{type(model).__name__} is on the meta device ({bare[0]}), without values: load it first, by "
            "load_state_dict(state, assign=True)"
        )
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


def _finish(
    norms: dict[str, _BatchNorm], found: Result, frozen: tuple[str, ...], method: str, passes: Passes
) -> CalibrationReport:
    """Check everything, then write everything."""
    changes, values = [], []
    try:
        for name, norm in norms.items():
            if name in found.moments:
                mean, var = running_statistics(name, norm, found.moments[name])
                changes.append(change(name, norm, found.moments[name], name not in found.dependent))
                values += [(norm.running_mean, mean), (norm.running_var, var)]
    except DataError:
        passes.forget()  # or the same result would be refused again
        raise
    write(values)
    tally = found.tally
    return CalibrationReport(
        samples=tally.samples,
        batches=tally.batches,
        layers=tuple(changes),
        unreached=tuple(name for name in norms if name not in found.moments),
        frozen=frozen,
        method=method,
        passes=found.passes,
        ranks=passes.ranks.size,
    )
