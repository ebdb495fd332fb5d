"""Perturbs neighbours and padding of samples, and finds the first layer whose output for them changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.doctor.measurements import Measured
from batchnorm.models.calibration.batches import Forward, cut, run, samples_in
from batchnorm.models.calibration.observers import by_batch
from batchnorm.models.graph.dispatch_observer import tensors_in
from batchnorm.models.norms.find import find_norms
from batchnorm.models.norms.kinds import is_synchronized
from batchnorm.models.verify import restored

from .passes import Samples, copied

_SAMPLES = 8  # of the batch that is perturbed; half of them are looked at
_MASKS = ("attention_mask", "mask", "padding_mask", "pixel_mask")
# Cuts two tensors of two runs to what must be the same in both.
View = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def perturb(model: nn.Module, samples: Samples, measured: Measured) -> None:
    """Add to `measured` how predictions depend on neighbours, in the mode that the model is in, and on "
    "padding."""
    batch = next((b for b in samples.batches if samples_in(b) >= 2), None)
    if batch is None:
        measured.unchecked.append("neighbours in a batch: every batch has one sample")
        return
    size = min(_SAMPLES, samples_in(batch))
    small = cut(batch, samples_in(batch), size)
    share = size / samples.count
    try:
        measured.mates = _mates(model, small, size // 2, samples.forward)
        measured.forwards += 2 * share
    except Exception as error:  # a model may refuse batches of another kind
        measured.unchecked.append(f"neighbours in a batch: the model raises {type(error).__name__}: {error}")
    try:
        found = _padding(model, small, samples.forward)
        if found is not None:
            measured.padding = found
            measured.forwards += 2 * share
    except Exception as error:
        measured.unchecked.append(f"padding: the model raises {type(error).__name__}: {error}")


def _mates(model: nn.Module, batch: object, kept: int, forward: Forward | None) -> tuple[float, str | None]:
    def neighbours(tensor: Tensor) -> Tensor:
        other = tensor.clone()
        if tensor.is_floating_point():
            other[kept:] = 1.5 * tensor[kept:].flip(0) + 0.5 * tensor.float().std().to(tensor.dtype)
        else:
            other[kept:] = tensor[:1]
        return other

    size = samples_in(batch)
    other = _changed(batch, size, neighbours)

    def view(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        is_batch = a.dim() > 0 and a.shape == b.shape and len(a) == size
        return (a[:kept], b[:kept]) if is_batch else (a.flatten()[:0], b.flatten()[:0])

    return _difference(model, batch, other, forward, view)


def _padding(
    model: nn.Module, batch: object, forward: Forward | None
) -> tuple[float, str | None, bool] | None:
    """Return the change with more padding; None where no sample is seen to have any."""
    x = _input(batch)
    if x is None:
        return None
    found = _lengths(batch, x)
    if found is None:
        return None
    lengths, axis, is_given = found
    size = x.shape[axis]
    more = 16 * max(1, -(-size // 64))

    def longer(tensor: Tensor) -> Tensor:
        for place in range(1, tensor.dim()):
            if tensor.shape[place] == size and (tensor is not x or place == axis):
                widths = [0, 0] * (tensor.dim() - 1 - place) + [0, more]
                return F.pad(tensor, widths)
        return tensor

    def view(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if a.dim() != b.dim() or len(a) != len(lengths) or len(b) != len(a):
            return a.flatten()[:0], b.flatten()[:0]
        places = [i for i in range(a.dim()) if a.shape[i] != b.shape[i]]
        if not places:
            return a.flatten(), b.flatten()
        if len(places) > 1 or places[0] == 0:
            return a.flatten()[:0], b.flatten()[:0]
        rows = [
            (a[i].narrow(places[0] - 1, 0, n), b[i].narrow(places[0] - 1, 0, n))
            for i, length in enumerate(lengths)
            if (n := length * a.shape[places[0]] // size) > 0
        ]
        return torch.cat([r[0].flatten() for r in rows]), torch.cat([r[1].flatten() for r in rows])

    other = _changed(batch, samples_in(batch), longer)
    change, layer = _difference(model, batch, other, forward, view)
    return change, layer, is_given


def _lengths(batch: object, x: Tensor) -> tuple[list[int], int, bool] | None:
    """Return the length of each sample, the axis, and whether they were given; None without padding."""
    if isinstance(batch, Mapping):
        lengths, mask = batch.get("lengths"), next((batch[n] for n in _MASKS if n in batch), None)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            lengths = mask.bool().sum(1)
        if isinstance(lengths, Tensor) and lengths.dim() == 1 and len(lengths) == len(x):
            sizes = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else None
            axes = [a for a in range(x.dim() - 1, 0, -1) if x.shape[a] == (sizes or x.shape[a])]
            fitting = [a for a in axes if x.shape[a] >= int(lengths.max())]
            if fitting and int(lengths.min()) < x.shape[fitting[0]]:
                return [int(length) for length in lengths], fitting[0], True
    for axis in (2, 1) if x.dim() == 3 else (1,) if x.dim() == 2 and not x.is_floating_point() else ():
        used = (x != 0).any(3 - axis) if x.dim() == 3 else x != 0
        places = torch.arange(1, used.shape[1] + 1, device=x.device)
        found = [int(n) for n in (used * places).amax(1)]
        if min(found) > 0 and len(set(found)) > 1 and sum(found) < 0.95 * len(found) * used.shape[1]:
            return found, axis, False
    return None


def _input(batch: object) -> Tensor | None:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(first, Mapping):
        tensors = [
            t for name, t in first.items() if isinstance(t, Tensor) and name not in (*_MASKS, "lengths")
        ]
        return next((t for t in tensors if t.dim() > 1), None)
    return first if isinstance(first, Tensor) and first.dim() > 1 else None


def _changed(batch: object, size: int, change: Callable[[Tensor], Tensor]) -> object:
    """Return a batch with its inputs changed: labels and masks of samples go along."""
    if isinstance(batch, Tensor):
        return change(batch) if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: _changed(value, size, change) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)) and batch:
        return [_changed(batch[0], size, change), *batch[1:]]
    return batch


def _difference(
    model: nn.Module, batch: object, other: object, forward: Forward | None, view: View
) -> tuple[float, str | None]:
    """Return the largest change of an output over the spread of outputs, and the first layer that makes "
    "it."""
    first, second = _Trace(model), _Trace(model)
    outputs = [_traced(model, given, forward, trace) for given, trace in ((batch, first), (other, second))]
    change = 0.0
    for a, b in zip(*outputs, strict=False):
        spread = float(a.std()) if a.numel() > 1 else float(a.abs().max()) if a.numel() else 0.0
        kept_a, kept_b = view(a, b)
        if kept_a.numel():
            change = max(change, float((kept_a - kept_b).abs().max()) / (spread or 1.0))
    return change, first.first_reader(second, view) if change > 0 else None


def _traced(model: nn.Module, batch: object, forward: Forward | None, trace: _Trace) -> list[Tensor]:
    modes = [(module, module.training) for module in model.modules()]
    is_compiled = any(m._compiled_call_impl is not None or hasattr(m, "dynamo_ctx") for m in model.modules())
    eagerly = torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
    with restored(model), torch.no_grad(), eagerly, contextlib.ExitStack() as stack:
        torch.manual_seed(0)  # the same dropout in both runs
        for found in find_norms(model):
            if is_synchronized(found.module) and found.module.training:  # alone: other ranks may not be here
                local = by_batch(found.name, found.module, lambda *_: None, strict=False)  # type: ignore[arg-type]
                stack.enter_context(local)
        stack.enter_context(trace.attached())
        outputs = tensors_in(run(model, copied(batch), forward))
        for module, training in modes:
            module.training = training
        return [t.detach().float().clone() for t in outputs if t.is_floating_point()]


class _Trace:
    """What every layer without layers in it, and every norm, receives and returns."""

    def __init__(self, model: nn.Module) -> None:
        norms = {found.module for found in find_norms(model)}
        self.leaves = {n: m for n, m in model.named_modules() if not m._modules or m in norms}
        self.calls: list[tuple[str, list[Tensor], list[Tensor]]] = []

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Record within the block."""
        with contextlib.ExitStack() as stack:
            for name, module in self.leaves.items():
                stack.callback(module.register_forward_hook(self._record(name), with_kwargs=True).remove)
            yield

    def _record(self, name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            given, made = ([t.detach().clone() for t in tensors_in(v)] for v in ((args, kwargs), result))
            self.calls.append((name, given, made))

        return hook

    def first_reader(self, other: _Trace, view: View) -> str | None:
        """Return the first layer with the same inputs and other outputs; None if it is in no layer."""
        for (name, given, made), (name_b, given_b, made_b) in zip(self.calls, other.calls, strict=False):
            if name != name_b:
                return None
            if _is_same(given, given_b, view) and not _is_same(made, made_b, view):
                return name
        return None


def _is_same(first: list[Tensor], second: list[Tensor], view: View) -> bool:
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        kept_a, kept_b = view(a, b)
        if kept_a.shape != kept_b.shape:
            return False
        if kept_a.numel():
            scale = float(kept_a.float().abs().max()) or 1.0
            if float((kept_a.float() - kept_b.float()).abs().max()) > 1e-4 * scale:
                return False
    return True
