"""`diagnose`: what is wrong with the batch normalizations of a model, where, by how much, and what to do."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.doctor.data_checks import check_data
from batchnorm.doctor.findings import Diagnosis, LayerGap
from batchnorm.doctor.measurements import Measured
from batchnorm.doctor.model_checks import check_model
from batchnorm.doctor.selection import check_ignored, concluded
from batchnorm.errors import ArgumentTypeError, OptionError
from batchnorm.torch.checks import shown_type

from .calibration.batches import Forward, cut, samples_in
from .diagnosis.passes import Samples, measure, random_numbers_kept, take
from .diagnosis.perturbation import perturb
from .diagnosis.structure import model_state
from .norms.find import inner_model
from .preconditions import verb


@verb()
def diagnose(
    model: nn.Module,
    data: Iterable[object] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    example: object = None,
    samples: int = 512,
    forward: Forward | None = None,
    ignore: Iterable[str] = (),
    progress: bool = False,
) -> Diagnosis:
    """Find what is wrong with the batch normalizations of `model`, which stays as it is.

    Without data it looks at the norms and what surrounds them. With data it also measures, on the first
    samples: what the running statistics cost against those of the samples, layer by layer; whether a
    prediction depends on its neighbours (in the mode that the model is in) or on padding; how noisy and how
    different the batches are; magnitudes. It takes up to 5 forwards of the samples, one for each layer that
    is off (16 at most), and parts of one. Modes, buffers, hooks, gradients and random state are as before,
    whatever happens; each process of torch.distributed diagnoses its own model.

    Args:
        model: with layers of torch, of this library, of timm or of others; compiled ones are looked through.
        data: batches as of `calibrate`, as they are in training; of (x, y) pairs, y is classes or targets.
        optimizer: of the model, for its weight decay.
        example: what the model takes, as of `inspect`; None = a part of the first batch.
        samples: number of samples that are taken of the data.
        forward: called as `forward(model, batch)` for batches of any other form; it returns the output.
        ignore: checks to leave out, "bias-before", or "bias-before:features.3" for one layer.
        progress: show a progress bar (needs rich).

    Returns:
        A report: `findings`, each with severity, layer, numbers, reason and remedy; `layers`, `scores`,
        `cost`. `print` shows it, notebooks show it as HTML, `to_json()` gives it to programs.

    Raises:
        OptionError: (a ValueError) an option's value, or an unknown check in `ignore`.
        DataError: (a ValueError) no sample, or a batch of unknown form.
        Exception: what the model itself raises in evaluation.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval()
        >>> [(finding.check, finding.layer) for finding in batchnorm.diagnose(model).findings]
        [('never-updated', '1'), ('bias-before', '1')]
    """
    started = time.perf_counter()
    ignored = check_ignored(ignore)
    _check_options(samples, optimizer)
    model = inner_model(model)
    is_ready = not any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers()))
    if data is not None and not is_ready:
        raise OptionError("the model has layers that are not initialized: run it once, or pass no data")
    measured = Measured()
    layers: tuple[LayerGap, ...] = ()
    with random_numbers_kept(model):
        if data is None:
            state, unchecked = model_state(model, example if is_ready else None, optimizer)
            found = check_model(state)
        else:
            taken = take(data, samples, forward, progress)
            measured = measure(model, taken)
            perturb(model, taken, measured)
            state, unchecked = model_state(model, _example(taken) if example is None else example, optimizer)
            more, layers = check_data(state, measured)
            # Whether a batch has one value per channel, the data shows.
            found = [of for of in check_model(state) if of.check != "one-value"] + more
    seconds = time.perf_counter() - started
    return concluded(state, measured, found, layers, ignored, seconds, unchecked)


def _check_options(samples: object, optimizer: object) -> None:
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise OptionError(f"samples is a number of 2 or more; got {samples!r}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentTypeError(f"optimizer is one of torch.optim; got {shown_type(optimizer)}")


def _example(taken: Samples) -> object:
    """Return a part of the first batch, as arguments of the model; None where only `forward` knows them."""
    batch = taken.batches[0]
    if taken.forward is not None:
        return None
    batch = cut(batch, samples_in(batch), min(2, samples_in(batch)))
    if isinstance(batch, (tuple, list)):
        batch = batch[0]
    return (batch,) if isinstance(batch, Tensor) else dict(batch) if isinstance(batch, Mapping) else None
