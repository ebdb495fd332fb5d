"""Ours and its rivals, each as a step on the same numbers: forward and backward, or a forward alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm

from .layer_cases import Case
from .layouts import memory_format
from .stock import StockChain

Step = Callable[[], object]
OURS = {
    2: batchnorm.BatchNorm1d,
    3: batchnorm.BatchNorm1d,
    4: batchnorm.BatchNorm2d,
    5: batchnorm.BatchNorm3d,
}


@dataclass(frozen=True)
class Tensors:
    """Inputs of every rival of a case; `residual` is None where the operation has none."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None


def tensors(case: Case, device: str = "cpu") -> Tensors:
    """Draw a case's tensors, of its dtype and in its layout."""
    generator = torch.Generator(device).manual_seed(0)
    layout = memory_format(case.layout, len(case.shape))

    def draw() -> Tensor:
        drawn = torch.randn(case.shape, generator=generator, device=device)
        return drawn.to(getattr(torch, case.dtype), memory_format=layout)

    return Tensors(draw(), draw(), draw() if case.residual else None)


def steps(case: Case) -> dict[str, Step]:
    """Return the step of each of a case's rivals that is installed, and `copy`: two passes."""
    given = tensors(case)
    target = torch.empty_like(given.dy)
    found = {name: _built(name, case, given) for name in case.rivals if is_available(name)}
    return {**found, "copy": lambda: target.copy_(given.dy)}


def is_available(name: str) -> bool:
    """Return whether a rival can run here."""
    if name == "compiled":  # torch.compile writes C++
        return any(map(shutil.which, ("c++", "g++", "clang++")))
    if name == "jax":
        return importlib.util.find_spec("jax") is not None
    if name == "keras":
        return (
            importlib.util.find_spec("keras") is not None
            and os.environ.setdefault("KERAS_BACKEND", "torch") == "torch"
        )
    return True


# Rivals that are one module, torch's or ours.
MODULES: dict[str, Callable[[Case], nn.Module]] = {
    "stock": lambda case: StockChain(len(case.shape), case.shape[1], case.activation),
    "stock-in-place": lambda case: StockChain(len(case.shape), case.shape[1], case.activation, in_place=True),
    "ours": lambda case: OURS[len(case.shape)](case.shape[1], activation=case.activation),
}


def _compiled(case: Case, given: Tensors) -> Step:
    torch.compiler.reset()  # else the ninth layer would be one too many for the compiler's cache
    chain = MODULES["stock"](case).train(not case.evaluation)
    return _torch_step(torch.compile(chain, fullgraph=True, dynamic=False), case, given)


def _keras(case: Case, given: Tensors) -> Step:
    """Keras's layers on its torch backend; as Keras has it, a channels-last tensor is `[N, *S, C]`."""
    import keras

    last = case.layout == "channels-last"
    if last:
        residual = None if given.residual is None else given.residual.movedim(1, -1)
        given = Tensors(given.x.movedim(1, -1), given.dy.movedim(1, -1), residual)
    norm = keras.layers.BatchNormalization(axis=-1 if last else 1, momentum=0.9, epsilon=1e-5)
    relu = keras.layers.ReLU()

    def chain(x: Tensor, residual: Tensor | None = None) -> Any:
        y = norm(x, training=not case.evaluation)
        if residual is not None:
            y = keras.ops.add(y, residual)
        return relu(y) if case.activation else y

    with torch.no_grad():
        chain(given.x)  # builds the layer
    return _torch_step(chain, case, given, list(norm.parameters()))


def _torch_step(
    model: Callable[..., Tensor], case: Case, given: Tensors, parameters: list[nn.Parameter] | None = None
) -> Step:
    if isinstance(model, nn.Module):
        model.to(getattr(torch, case.dtype)).train(not case.evaluation)
        parameters = list(model.parameters())
    inputs = [tensor for tensor in (given.x, given.residual) if tensor is not None]
    if case.evaluation:
        mode = torch.inference_mode if case.inference else torch.no_grad

        def forward() -> None:
            with mode():
                model(*inputs)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with_gradient = [*leaves, *(parameters or ())]

    def forward_and_backward() -> None:
        torch.autograd.backward(model(*leaves), given.dy)
        for tensor in with_gradient:
            tensor.grad = None  # within the time: every rival frees what it allocated

    return forward_and_backward


def _jax(case: Case, given: Tensors) -> Step:
    from . import jax_layer

    return jax_layer.step(case, given.x, given.dy, given.residual)


def _built(name: str, case: Case, given: Tensors) -> Step:
    if name in MODULES:
        return _torch_step(MODULES[name](case), case, given)
    return {"compiled": _compiled, "jax": _jax, "keras": _keras}[name](case, given)
