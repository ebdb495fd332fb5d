"""Runs the samples through the model by each statistics, and records what its norms receive."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.doctor.measurements import Array, Measured, Received, Score, scored
from batchnorm.errors import BatchNormError, DataError, MissingExtraError
from batchnorm.models.calibration.batches import Forward, limited, run, samples_in
from batchnorm.models.calibration.observers import (
    BatchObserver,
    by_statistics,
    evaluation,
    received,
)
from batchnorm.models.calibration.packing import on_host
from batchnorm.models.graph.dispatch_observer import tensors_in
from batchnorm.models.norms.find import Found, find_norms, split_frozen, tracking_norms
from batchnorm.models.norms.kinds import BatchNormBase
from batchnorm.models.verify import restored
from batchnorm.statistics.adapted import Adapted
from batchnorm.statistics.moments import PooledMoments
from batchnorm.torch.functional import moments, normalize_batch

# Layers whose statistics are replaced alone, at most: those that are furthest off.
MOST_ALONE = 16


@dataclass
class Samples:
    """The samples of a diagnosis, kept for all passes.

    Attributes:
        batches: as the data gives them.
        forward: as of `calibrate`.
    """

    batches: list[object]
    forward: Forward | None
    progress: bool = False
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = sum(map(samples_in, self.batches))
        if not self.batches or not self.count:
            raise DataError(
                "diagnose received no sample: data is empty, or an iterator that was used up before"
            )

    def labels(self) -> NDArray[np.generic] | None:
        """Return the second parts of (x, y) batches as one array; None where there are none."""
        pairs = [b[1] for b in self.batches if isinstance(b, (tuple, list)) and len(b) == 2]
        if len(pairs) != len(self.batches) or not all(isinstance(y, Tensor) for y in pairs):
            return None
        try:
            return np.concatenate([y.detach().cpu().numpy() for y in pairs])
        except (ValueError, TypeError):  # of several shapes, or bfloat16
            return None

    def outputs(self, model: nn.Module, description: str) -> list[Array]:
        """Return the first floating tensor of the output on each batch."""
        found = []
        for batch in self._shown(description):
            tensors = [
                t for t in tensors_in(run(model, copied(batch), self.forward)) if t.is_floating_point()
            ]
            if tensors:
                found.append(tensors[0].detach().cpu().double().numpy())
        return found

    def _shown(self, description: str) -> Iterable[object]:
        if not self.progress:
            return self.batches
        try:
            from rich.progress import track
        except ModuleNotFoundError:
            raise MissingExtraError("diagnose(progress=True)", "rich", "study") from None
        return track(self.batches, description=description)


@contextlib.contextmanager
def random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Restore after the block the random numbers of torch, NumPy and Python, which data and model may "
    "draw."""
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.is_cuda})
    before, before_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)


def copied(batch: object) -> object:
    """Return a batch with tensors of its own: a forward may write into its input, which comes again."""
    found: object = pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, batch
    )
    return found


def take(data: Iterable[object], samples: int, forward: Forward | None, progress: bool) -> Samples:
    """Return the first batches of the data, of `samples` samples together at most; only the first may be cut.

    A batch that was cut would look like one of a few samples.
    """
    batches: list[object] = []
    count = 0
    for batch in limited([data] if isinstance(data, Tensor) else data, samples):
        count += samples_in(batch)
        batches.append(batch)
        if count >= samples:
            break
    # `limited` has cut the last one where the data goes on in it
    if len(batches) > 1 and count == samples and samples_in(batches[-1]) < samples_in(batches[0]):
        batches.pop()
    return Samples(batches, forward, progress)


def measure(model: nn.Module, samples: Samples) -> Measured:
    """Return what the samples show; the model is as before, whatever happens.

    Raises:
        DataError: a batch of unknown form.
        Exception: what the model itself raises in evaluation.
    """
    measured = Measured(samples=samples.count)
    passes = _Passes(model, samples, measured)
    with restored(model), evaluation(model):
        passes.by_running()
        if measured.broken is None and not measured.is_data_broken:
            passes.by_batch()
            passes.by_population()
            passes.alone()
            passes.adapted()
    return measured


class _Passes:
    """The passes of one diagnosis, in evaluation."""

    def __init__(self, model: nn.Module, samples: Samples, measured: Measured) -> None:
        self.model, self.samples, self.measured = model, samples, measured
        self.norms = find_norms(model)
        _, live = split_frozen(tracking_norms(model))
        self.tracking: dict[str, BatchNormBase] = {n: norm for n, norm in live.items() if _fits(norm)}
        self.labels = samples.labels()
        self._kept: dict[str, Array] = {}

    def by_running(self) -> None:
        """Record what the norms receive, as the model is deployed, and where it is first not finite."""
        calls: Counter[str] = Counter()
        for leaf in _floating(self.samples.batches):
            self.measured.is_data_broken |= not bool(leaf.isfinite().all())
        with contextlib.ExitStack() as stack:
            for found in self.norms:
                hook = self._receive(found, calls)
                stack.callback(found.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for name, module in self.model.named_modules():
                if not module._modules:
                    stack.callback(module.register_forward_hook(self._look(name), with_kwargs=True).remove)
            stack.callback(self.model.register_forward_pre_hook(lambda *_: calls.clear()).remove)
            self._score("running")

    def by_batch(self) -> None:
        """Normalize by each batch; the moments of all are those of the population."""
        observer = BatchObserver(self.tracking)
        try:
            with observer.attached(), observer.one_batch():
                self._score("batch")
        except BatchNormError as error:
            self.measured.unchecked.append(f"statistics of each batch: {error}")
            return
        self.measured.population = {n: _as_arrays(of) for n, of in observer.observed(0).moments.items()}

    def by_population(self) -> None:
        """Normalize by the statistics of the population, as `calibrate` would set them."""
        if self.measured.population:
            with self._replaced(self.measured.population):
                self._score("population")
            self._compare()

    def alone(self) -> None:
        """Replace the statistics of one layer at a time, of those that are furthest off."""
        off = {
            name: _distance(norm, self.measured.population[name])
            for name, norm in self.tracking.items()
            if name in self.measured.population
        }
        if "population" not in self.measured.scores or not any(off.values()):
            return
        furthest = [n for n in sorted(off, key=lambda n: -off[n])[:MOST_ALONE] if off[n] > 0.1]
        for name in furthest:
            with self._replaced({name: self.measured.population[name]}):
                self.measured.alone[name] = self._score(name, "population", keep=False)

    def adapted(self) -> None:
        """Adapt the running statistics to each batch."""
        if self.measured.measure in ("", "difference of outputs") or not self.measured.population:
            return
        with contextlib.ExitStack() as stack:
            for norm in self.tracking.values():
                if "forward" not in vars(norm):
                    vars(norm)["forward"] = _adapting(norm)
                    stack.callback(vars(norm).pop, "forward", None)
            self._score("adapted")

    def _score(self, name: str, reference: str = "", *, keep: bool = True) -> Score:
        outputs = self.samples.outputs(self.model, f"Diagnosing, {name or 'the model'}")
        self.measured.forwards += 1
        try:
            whole = np.concatenate(outputs)
        except ValueError:  # outputs of several lengths, or none at all
            whole = np.concatenate([o.reshape(-1) for o in outputs]) if outputs else np.zeros(0)
        measure, score = scored(whole, self.labels, self._kept.get(reference))
        if keep:
            self._kept[name] = whole
            self.measured.measure = measure
            self.measured.scores[name] = score
        return score

    def _compare(self) -> None:
        """Score outputs without labels by their difference to those of the population."""
        if self.measured.measure == "difference of outputs":
            for name in ("running", "batch"):
                _, score = scored(self._kept[name], None, self._kept["population"])
                self.measured.scores[name] = score

    @contextlib.contextmanager
    def _replaced(self, found: Mapping[str, PooledMoments]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, of in found.items():
                wide = PooledMoments(of.count, torch.from_numpy(of.mean), torch.from_numpy(of.m2))
                try:
                    stack.enter_context(by_statistics(name, self.tracking[name], wide))
                except DataError as error:
                    self.measured.unchecked.append(str(error))
            yield

    def _receive(self, found: Found, calls: Counter[str]) -> Any:
        def hook(norm: nn.Module, args: Any, kwargs: Any) -> None:
            input, mask = received(norm, args, kwargs)
            if not input.is_floating_point() or input.dim() < 2 or not input.numel():
                return
            of = on_host({"": moments(input, mask)})
            if not of:
                return
            kept = self.measured.received.setdefault(found.name, Received())
            means = input.detach().float().flatten(2).mean(2) if input.dim() > 2 else input.detach().float()
            peak = float(input.detach().abs().max())
            dtype = str(input.dtype).removeprefix("torch.")
            call, calls[found.name] = calls[found.name], calls[found.name] + 1
            kept.add(call, _as_arrays(of[""]), means.cpu().double().numpy(), peak, dtype)

        return hook

    def _look(self, name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            if self.measured.broken is None and not self.measured.is_data_broken:
                given = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
                made = [t for t in tensors_in(result) if t.is_floating_point()]
                # A mask of attention holds -inf on purpose, and is given as it is.
                if not all(_has_no_nan(t) for t in made) and all(_has_no_nan(t) for t in given):
                    self.measured.broken = name

        return hook


def _has_no_nan(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())


def _fits(norm: BatchNormBase) -> bool:
    mean = norm._buffers.get("running_mean")
    return mean is not None and not mean.is_meta and not hasattr(mean, "full_tensor")


def _floating(batches: list[object]) -> Iterator[Tensor]:
    for leaf in tensors_in(batches):
        if leaf.is_floating_point():
            yield leaf


def _as_arrays(found: PooledMoments) -> PooledMoments:
    return PooledMoments(float(found.count), found.mean.numpy().copy(), found.m2.numpy().copy())


def _distance(norm: BatchNormBase, found: PooledMoments) -> float:
    """Return how far the running statistics are off, in standard deviations and logs of them."""
    mean, var = (norm._buffers[n].detach().cpu().double().numpy() for n in ("running_mean", "running_var"))  # type: ignore[union-attr]
    new = found.m2 / max(found.count, 1) + norm.eps
    with np.errstate(invalid="ignore", divide="ignore"):
        off = np.sqrt(np.mean((found.mean - mean) ** 2 / new)) + np.sqrt(
            np.mean((0.5 * np.log(new / (var + norm.eps))) ** 2)
        )
    return float(off) if np.isfinite(off) else float("inf")


def _adapting(norm: BatchNormBase) -> Any:
    """Return a forward of a norm by `Adapted`."""
    activation = getattr(norm, "activation", None)

    def forward(input: Tensor, residual: Tensor | None = None, **_: Any) -> Tensor:
        y, _found = normalize_batch(
            input, norm.weight, norm.bias, norm.eps, residual=residual, activation=activation,
            statistics=Adapted(), training=False, running_mean=norm.running_mean,
            running_var=norm.running_var,
        )  # fmt: skip
        return y

    return forward
