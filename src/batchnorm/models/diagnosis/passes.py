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
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from batchnorm.doctor.measurements import Array, Measured, Received
from batchnorm.doctor.passes import Passes
from batchnorm.errors import BatchNormError, DataError, MissingExtraError
from batchnorm.models.calibration.batches import Forward, limited, run, samples_in
from batchnorm.models.calibration.observers import (
    BatchObserver,
    by_batch,
    by_statistics,
    evaluation,
    holding,
    received,
    running_buffers,
)
from batchnorm.models.calibration.packing import on_host
from batchnorm.models.graph.dispatch_observer import tensors_in
from batchnorm.models.norms.find import Found, find_norms, split_frozen, tracking_norms
from batchnorm.models.norms.kinds import BatchNormBase, is_synchronized
from batchnorm.models.verify import restored
from batchnorm.statistics.adapted import Adapted
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.synced import Synced
from batchnorm.torch.functional import moments


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
    """Restore, after the block, the random state of torch, NumPy and Python: data and model may draw."""
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.is_cuda})
    before, before_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)


@contextlib.contextmanager
def without_other_ranks(model: nn.Module) -> Iterator[None]:
    """Let norms take moments of this process alone within the block: the other processes may not be here."""
    with contextlib.ExitStack() as stack:
        for found in find_norms(model):
            policy, norm = getattr(found.module, "_statistics", None), found.module
            if isinstance(policy, Synced):
                stack.enter_context(holding(vars(norm), _statistics=policy.over))
            elif is_synchronized(norm) and norm.training:  # torch's own
                local = by_batch(found.name, norm, lambda *_: None, strict=False)  # type: ignore[arg-type]
                stack.enter_context(local)
        yield


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


def measure(model: nn.Module, samples: Samples, measured: Measured) -> None:
    """Add to `measured` what the samples show; the model is as before, whatever happens.

    Raises:
        DataError: a batch of unknown form.
        Exception: what the model itself raises in evaluation.
    """
    measured.samples = samples.count
    with restored(model), evaluation(model), without_other_ranks(model):
        _Passes(model, samples, measured).take()


class _Passes(Passes):
    """The passes of one diagnosis, in evaluation."""

    def __init__(self, model: nn.Module, samples: Samples, measured: Measured) -> None:
        super().__init__(measured, samples.labels())
        self.model, self.samples = model, samples
        self.norms = find_norms(model)
        _, live = split_frozen(tracking_norms(model))
        self.tracking: dict[str, BatchNormBase] = {n: norm for n, norm in live.items() if has_values(norm)}

    def outputs(self, name: str) -> list[Array]:
        return self.samples.outputs(self.model, f"Diagnosing, {name or 'the model'}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
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
            yield

    def by_batch(self) -> None:
        observer = BatchObserver(self.tracking)
        try:
            with observer.attached(), observer.one_batch():
                self.score("batch")
        except BatchNormError as error:
            self.measured.unchecked.append(f"statistics of each batch: {error}")
            return
        self.measured.population = {n: _as_arrays(of) for n, of in observer.observed(0).moments.items()}

    @contextlib.contextmanager
    def adapting(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for norm in self.tracking.values():
                stack.enter_context(_adapting(norm))
            yield

    def statistics(self, name: str) -> tuple[Array, Array, float]:
        mean, var = (of.detach().cpu().double().numpy() for of in running_buffers(self.tracking[name]))
        return mean, var, self.tracking[name].eps

    @contextlib.contextmanager
    def replaced(self, found: Mapping[str, PooledMoments]) -> Iterator[None]:
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
            peak = float(input.detach().abs().max())
            dtype = str(input.dtype).removeprefix("torch.")
            means = _sample_means(input, mask).cpu().double().numpy()
            call, calls[found.name] = calls[found.name], calls[found.name] + 1
            kept.add(call, _as_arrays(of[""]), means, peak, dtype)

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


def has_values(norm: BatchNormBase) -> bool:
    """Whether the running statistics of a norm can be read: not lazy, on the meta device, or sharded."""
    mean = norm._buffers.get("running_mean")
    return mean is not None and not (is_lazy(mean) or mean.is_meta or hasattr(mean, "full_tensor"))


def _floating(batches: list[object]) -> Iterator[Tensor]:
    for leaf in tensors_in(batches):
        if leaf.is_floating_point():
            yield leaf


def _as_arrays(found: PooledMoments) -> PooledMoments:
    return PooledMoments(float(found.count), found.mean.numpy().copy(), found.m2.numpy().copy())


@contextlib.contextmanager
def _adapting(norm: BatchNormBase) -> Iterator[None]:
    """Let a norm of any class adapt its running statistics to each of its inputs within the block."""
    mean, var = running_buffers(norm)
    prior = Adapted().prior

    def mix(_: nn.Module, args: Any, kwargs: Any) -> None:
        input, mask = received(norm, args, kwargs)
        found, share = moments(input, mask), len(input) / (len(input) + prior)
        new = found.mean, found.m2 / found.count.clamp(min=1)
        for name, old, of in zip(("running_mean", "running_var"), (mean, var), new, strict=True):
            norm._buffers[name] = old + (share * (of - old)).to(old)

    handle = norm.register_forward_pre_hook(mix, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        norm._buffers |= {"running_mean": mean, "running_var": var}


def _sample_means(input: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of each sample and channel, `[N, C]`, of the values that count."""
    x = input.detach().float()
    if mask is None:
        return x.flatten(2).mean(2) if x.dim() > 2 else x
    valid = mask[:, None].to(x)
    places = tuple(range(2, x.dim()))
    sums, counts = ((of.sum(places) if places else of) for of in (x * valid, valid))
    return (sums / counts)[counts[:, 0] > 0]
