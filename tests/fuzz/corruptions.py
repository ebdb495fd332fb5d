"""States that no constructor makes: what a bad checkpoint or a careless assignment leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _buffer(name: str, change: Callable[[Tensor], Any]) -> Callable[[nn.Module], None]:
    def corrupt(layer: nn.Module) -> None:
        if layer._buffers.get(name) is not None:
            layer._buffers[name] = change(layer._buffers[name])

    return corrupt


def _parameter(name: str, change: Callable[[Tensor], Any]) -> Callable[[nn.Module], None]:
    def corrupt(layer: nn.Module) -> None:
        if layer._parameters.get(name) is not None:
            new = change(layer._parameters[name].detach())
            layer._parameters[name] = None if new is None else nn.Parameter(new)

    return corrupt


def _option(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda layer: vars(layer).__setitem__(name, value)


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    """Return a change that puts a value in the first place."""

    def change(old: Tensor) -> Tensor:
        new = old.clone()
        new[:1] = value
        return new

    return change


def _longer(old: Tensor) -> Tensor:
    return torch.cat([old, old.new_ones(1)])


def _in_one_place(old: Tensor) -> Tensor:
    return old[:1].clone().expand(old.shape)


def _other_dtype(old: Tensor) -> Tensor:
    return old.to(torch.float32 if old.dtype is torch.float64 else torch.float64)


# Answered: the state has a meaning, and the answer is that of the reference for it.
ANSWERED: dict[str, Callable[[nn.Module], None]] = {
    "running_var negative": _buffer("running_var", _filled(-0.5)),
    "running_var nan": _buffer("running_var", _filled(float("nan"))),
    "running_var zero": _buffer("running_var", _filled(0.0)),
    "running_mean nan": _buffer("running_mean", _filled(float("nan"))),
    "running_mean strided": _buffer("running_mean", lambda t: torch.stack([t, t], -1)[:, 0]),
    "running_var other dtype": _buffer("running_var", _other_dtype),
    "num_batches negative": _buffer("num_batches_tracked", lambda t: t * 0 - 7),
    "num_batches float": _buffer("num_batches_tracked", lambda t: t.double()),
    "num_batches int32": _buffer("num_batches_tracked", lambda t: t.int()),
    "num_batches None": _buffer("num_batches_tracked", lambda _: None),
    "num_batches of one": _buffer("num_batches_tracked", lambda t: t.reshape(1)),
    "weight None": _parameter("weight", lambda _: None),
    "bias None": _parameter("bias", lambda _: None),
    "weight nan": _parameter("weight", _filled(float("nan"))),
    "bias inf": _parameter("bias", _filled(float("-inf"))),
    "weight zero": _parameter("weight", torch.zeros_like),
    "weight strided": _parameter("weight", lambda t: torch.stack([t, t], -1)[:, 0]),
}

# Refused, or answered where the call does not need what is wrong: never anything else.
REFUSED: dict[str, Callable[[nn.Module], None]] = {
    "weight inf": _parameter("weight", _filled(float("inf"))),
    "running_var inf": _buffer("running_var", _filled(float("inf"))),
    "running_mean inf": _buffer("running_mean", _filled(float("inf"))),
    "running_mean grad": _buffer("running_mean", lambda t: t.clone().requires_grad_()),
    "running_var grad": _buffer("running_var", lambda t: t.clone().requires_grad_()),
    "running_var column": _buffer("running_var", lambda t: t.clone().unsqueeze(1)),
    "weight column": _parameter("weight", lambda t: t.unsqueeze(1)),
    "running_mean None": _buffer("running_mean", lambda _: None),
    "running_var None": _buffer("running_var", lambda _: None),
    "running_mean longer": _buffer("running_mean", _longer),
    "running_var longer": _buffer("running_var", _longer),
    "running_var empty": _buffer("running_var", lambda t: t[:0].clone()),
    "running_mean int": _buffer("running_mean", lambda t: t.long()),
    "running_var complex": _buffer("running_var", lambda t: t.to(torch.complex64)),
    "running_mean meta": _buffer("running_mean", lambda t: t.to("meta")),
    "running_var meta": _buffer("running_var", lambda t: t.to("meta")),
    "running_mean in one place": _buffer("running_mean", _in_one_place),
    "running_var in one place": _buffer("running_var", _in_one_place),
    "running_mean inference": _buffer("running_mean", lambda t: _inference(t)),
    "running_var sparse": _buffer("running_var", lambda t: t.to_sparse()),
    "num_batches meta": _buffer("num_batches_tracked", lambda t: t.to("meta")),
    "num_batches two": _buffer("num_batches_tracked", lambda t: torch.stack([t, t])),
    "num_batches inference": _buffer("num_batches_tracked", lambda t: _inference(t)),
    "skipped gone": _buffer("skipped", lambda _: None),
    "skipped meta": _buffer("skipped", lambda t: t.to("meta")),
    "skipped bool": _buffer("skipped", lambda t: t.bool()),
    "weight longer": _parameter("weight", _longer),
    "bias longer": _parameter("bias", _longer),
    "weight other dtype": _parameter("weight", _other_dtype),
    "bias other dtype": _parameter("bias", _other_dtype),
    "weight meta": _parameter("weight", lambda t: t.to("meta")),
    "bias meta": _parameter("bias", lambda t: t.to("meta")),
    "weight complex": _parameter("weight", lambda t: t.to(torch.complex64)),
    "eps nan": _option("eps", float("nan")),
    "eps text": _option("eps", "1e-5"),
    "eps None": _option("eps", None),
    "momentum text": _option("momentum", "0.1"),
    "momentum two": _option("momentum", torch.tensor([0.1, 0.2])),
    "momentum meta": _option("momentum", torch.tensor(0.1, device="meta")),
    "activation unknown": _option("activation", "swish"),
    "activation a module": _option("activation", nn.ReLU()),
    "small_batch unknown": _option("_small_batch", "ignore"),
    "nonfinite unknown": _option("_nonfinite", "ignore"),
    "statistics a class": _option("_statistics", nn.ReLU),
    "statistics None": _option("_statistics", None),
}


def _inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()
