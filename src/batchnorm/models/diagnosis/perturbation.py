"""Runs a torch model on perturbed samples, and records what its layers make of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.doctor.measurements import Measured
from batchnorm.doctor.perturbation import (
    MASKS,
    SAMPLES,
    Call,
    Neighbours,
    Padding,
    Run,
    Values,
    compared,
    padding_of,
)
from batchnorm.models.calibration.batches import cut, run, samples_in
from batchnorm.models.graph.dispatch_observer import tensors_in
from batchnorm.models.norms.find import find_norms
from batchnorm.models.verify import restored

from .passes import Samples, copied, without_other_ranks


def perturb(model: nn.Module, samples: Samples, measured: Measured) -> None:
    """Add to `measured` how predictions depend on neighbours, in the mode the model is in, and on padding."""
    batch = next((b for b in samples.batches if samples_in(b) >= 2), None)
    if batch is None:
        measured.unchecked.append("neighbours in a batch: every batch has one sample")
        return
    size = min(SAMPLES, samples_in(batch))
    small = cut(batch, samples_in(batch), size)
    neighbours, padding = Neighbours(size), _padding(small)
    share = size / samples.count
    first: Run | None = None
    try:
        first = _run(model, small, samples)
        second = _run(model, _changed(small, size, neighbours.changed), samples)
        measured.mates = compared(first, second, neighbours.view)
        measured.forwards += 2 * share
    except Exception as error:  # a model may refuse batches of another kind
        measured.unchecked.append(f"neighbours in a batch: the model raises {type(error).__name__}: {error}")
    if padding is None or first is None:
        return
    try:
        if not padding.is_least:
            first = _run(model, _changed(small, size, padding.trimmed), samples)
            measured.forwards += share
        second = _run(model, _changed(small, size, padding.changed), samples)
        measured.padding = *compared(first, second, padding.view), padding.is_given
        measured.forwards += share
    except Exception as error:
        measured.unchecked.append(f"padding: the model raises {type(error).__name__}: {error}")


def _padding(batch: object) -> Padding | None:
    """Return the padding of the input of a batch; None where no sample is seen to have any."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    named = {"": first} if not isinstance(first, Mapping) else first
    given = {name: as_values(t) for name, t in named.items() if isinstance(t, Tensor)}
    others = [values for name, values in given.items() if name not in (*MASKS, "lengths")]
    x = next((values for values in others if values.ndim > 1), None)
    mask = next((given[name] for name in MASKS if name in given), None)
    return None if x is None else padding_of(x, given.get("lengths"), mask)


def as_values(tensor: Tensor) -> Values:
    """Return a copy of a tensor's values on the host; of 16 bits as float32."""
    tensor = tensor.detach().cpu()
    values: Values = (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()
    return values.copy()


def _changed(batch: object, size: int, change: Callable[[Values], Values]) -> object:
    """Return a batch with its inputs changed: labels and masks of samples go along."""
    if isinstance(batch, Tensor):
        if not batch.dim() or len(batch) != size:
            return batch
        return torch.from_numpy(change(as_values(batch))).to(batch)
    if isinstance(batch, Mapping):
        return {key: _changed(value, size, change) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)) and batch:
        return [_changed(batch[0], size, change), *batch[1:]]
    return batch


def _run(model: nn.Module, batch: object, samples: Samples) -> Run:
    """Run the model on a batch, in the mode that it is in, and record every layer; it is as before."""
    modes = [(module, module.training) for module in model.modules()]
    is_compiled = any(m._compiled_call_impl is not None or hasattr(m, "dynamo_ctx") for m in model.modules())
    eagerly = torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
    calls: list[Call] = []

    def recorded(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            given, made = ([as_values(t) for t in tensors_in(v)] for v in ((args, kwargs), result))
            calls.append(Call(name, given, made))

        return hook

    with restored(model), torch.no_grad(), eagerly, contextlib.ExitStack() as stack:
        torch.manual_seed(0)  # the same dropout in both runs
        stack.enter_context(without_other_ranks(model))
        of_norms = {found.module for found in find_norms(model)}
        for name, module in model.named_modules():
            if not module._modules or module in of_norms:
                stack.callback(module.register_forward_hook(recorded(name), with_kwargs=True).remove)
        outputs = tensors_in(run(model, copied(batch), samples.forward))
        for module, training in modes:
            module.training = training
        return Run([as_values(t) for t in outputs if t.is_floating_point()], calls)
